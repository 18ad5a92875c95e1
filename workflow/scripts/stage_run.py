"""Stage one run: decompress it into its own folder of the stage root."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.bids import Origin
from keepstill.errors import KeepstillError
from keepstill.mean_echo import stage_mean
from keepstill.settings import RealignSettings
from keepstill.stage import stage_run


def main() -> None:
    """Parse, then stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bids-dir", "bold", "sidecar", "stage-dir"):
        is_required = name in ("bold", "stage-dir")
        parser.add_argument(f"--{name}", required=is_required, type=Path, metavar="PATH")
    parser.add_argument("--run", required=True, metavar="NAME")
    parser.add_argument("--multi-echo", action="store_true", help="its echoes follow")
    parser.add_argument("--mean-of", nargs=2, action="append", metavar=("NAME", "FILE"))
    parser.add_argument("--settings", required=True, metavar="JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = RealignSettings.from_json(args.settings)
    origin = Origin(args.bids_dir, args.sidecar, args.multi_echo)
    try:
        if echoes := {name: Path(path) for name, path in args.mean_of or ()}:
            stage_mean(echoes, args.run, origin, args.stage_dir, settings)
        else:
            stage_run(args.bold, args.run, origin, args.stage_dir, settings)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
