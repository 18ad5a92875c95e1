"""Make the page that lists all complete runs of a study."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.errors import KeepstillError
from keepstill.report import write_study_page


def main() -> None:
    """Parse, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_study_page(args.output_dir)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
