"""Stage one run: decompress it into its own folder of the stage root."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.bids import Origin
from keepstill.errors import KeepstillError
from keepstill.settings import RealignSettings
from keepstill.stage import stage_run


def main() -> None:
    """Parse, then stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bold", required=True, type=Path, metavar="FILE")
    parser.add_argument("--run", required=True, metavar="NAME")
    parser.add_argument("--bids-dir", default="", metavar="DIR", help="empty: no data set")
    parser.add_argument("--sidecar", type=Path, metavar="FILE", help="of a run in no data set")
    parser.add_argument("--multi-echo", action="store_true", help="its echoes follow")
    parser.add_argument("--stage-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--settings", required=True, metavar="JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bids_dir = Path(args.bids_dir) if args.bids_dir else None
    try:
        settings = RealignSettings.from_json(args.settings)
        origin = Origin(bids_dir, args.sidecar, args.multi_echo)
        stage_run(args.bold, args.run, origin, args.stage_dir, settings)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
