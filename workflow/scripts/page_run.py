"""Make the page of one complete run."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.errors import KeepstillError
from keepstill.report import write_run_page


def main() -> None:
    """Parse, then write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="of a simulated run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_run_page(args.manifest, args.output_dir, args.truth)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
