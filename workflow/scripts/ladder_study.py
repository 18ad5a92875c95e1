"""Simulate the run that the ladder is timed on, once it is known that ITK is there."""

import argparse
import sys
from pathlib import Path

from keepstill.errors import KeepstillError
from keepstill.ladder.itk_bridge import require_itk
from keepstill.simulate import StudyPlan, simulate_study


def main() -> None:
    """Parse, then simulate; what the user can mend is one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--volumes", required=True, type=int)
    parser.add_argument("--threads", default=1, type=int)
    args = parser.parse_args()
    try:
        require_itk()
        simulate_study(args.out, StudyPlan(subjects=1, volumes=args.volumes), args.threads)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
