"""Time every rung of the ladder on a simulated run, and write table, figures and picture."""

import argparse
import os
import sys
from pathlib import Path

from keepstill.errors import KeepstillError
from keepstill.ladder.measure import Trial
from keepstill.ladder.results import put_ladder


def main() -> None:
    """Parse, then measure; what the user can mend is one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--study", "--out", "--stage-root", "--docs"):
        parser.add_argument(name, type=Path, metavar="DIR")
    for name in ("--launcher", "--binding"):
        parser.add_argument(name)
    for name in ("--ranks", "--every-volume", "--repeats"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    (source,) = args.study.glob("sub-*/func/*_bold.nii.gz")
    how = (args.ranks, args.launcher, args.binding, args.every_volume, args.repeats)
    handle = int(os.environ.get("KEEPSTILL_TELL_FD", sys.stderr.fileno()))
    with os.fdopen(handle, "w", closefd=False) as terminal:
        try:
            trial = Trial(source, *how, args.stage_root)
            print(put_ladder(trial, args.out, args.docs, terminal))
        except KeepstillError as error:
            print(f"keepstill: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
