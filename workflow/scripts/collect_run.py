"""Collect one realigned run: compress it, write its files, its manifest last, and say so."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.errors import KeepstillError
from keepstill.settings import RealignSettings
from keepstill.start import start_quickly


def main() -> None:
    """Parse, collect, free the stage, and say in one line what the run was like."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--settings", required=True, metavar="JSON")
    parser.add_argument("--threads", default=1, type=int, metavar="N")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = RealignSettings.from_json(args.settings)
    start_quickly()
    from keepstill.collect import collect_run, summary_line
    from keepstill.stage import remove_stage

    try:
        summary = collect_run(args.stage_dir, args.output_dir, settings, args.threads)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"keepstill: {summary_line(args.stage_dir.name, summary)}")
    remove_stage(args.stage_dir)


if __name__ == "__main__":
    main()
