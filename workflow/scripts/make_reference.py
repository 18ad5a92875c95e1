"""Make the reference that the runs of a scope share, of the first of them, which is staged."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.errors import KeepstillError
from keepstill.settings import RealignSettings
from keepstill.start import start_quickly


def main() -> None:
    """Parse, then make it; what is staged goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("stage-dir", "output-dir"):
        parser.add_argument(f"--{name}", required=True, type=Path, metavar="DIR")
    parser.add_argument("--scope", required=True, metavar="NAME")
    parser.add_argument("--settings", required=True, metavar="JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = RealignSettings.from_json(args.settings)
    start_quickly()
    from keepstill.ranks import Alone, n_threads_of
    from keepstill.realign import Crew
    from keepstill.shared_reference import make_shared_reference
    from keepstill.stage import remove_stage

    crew = Crew(n_threads_of(Alone()))
    try:
        line = make_shared_reference(args.stage_dir, args.scope, args.output_dir, settings, crew)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"keepstill: {line}")
    remove_stage(args.stage_dir)


if __name__ == "__main__":
    main()
