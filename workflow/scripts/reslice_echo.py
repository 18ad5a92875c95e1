"""Reslice one echo of a multi-echo run with its run's motion: stage, reslice, write, and say so."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.bids import Origin
from keepstill.errors import KeepstillError
from keepstill.settings import RealignSettings


def main() -> None:
    """Parse, then reslice; what is staged goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bold", required=True, type=Path, metavar="FILE")
    for name in ("run", "leader"):
        parser.add_argument(f"--{name}", required=True, metavar="NAME")
    parser.add_argument("--bids-dir", type=Path, metavar="DIR", help="of a run in a data set")
    parser.add_argument("--sidecar", type=Path, metavar="FILE", help="of a run in no data set")
    parser.add_argument("--stage-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--settings", required=True, metavar="JSON")
    parser.add_argument("--threads", default=1, type=int, metavar="N")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from keepstill.echoes import Echo, realign_echo

    echo = Echo(args.bold, args.run, args.leader, Origin(args.bids_dir, args.sidecar))
    settings = RealignSettings.from_json(args.settings)
    try:
        line = realign_echo(echo, args.stage_dir, args.output_dir, settings, args.threads)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"keepstill: {line}")


if __name__ == "__main__":
    main()
