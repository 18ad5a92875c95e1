"""Start a run's ranks on cores of their own: lease the cores, fill `{cores}`, become the command.

A lane that waits for cores says so where KEEPSTILL_TELL_FD points, too.
"""

import argparse
import logging
import os
import sys

from keepstill.errors import KeepstillError
from keepstill.lanes import become


def main() -> None:
    """Parse, then become the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, metavar="NAME")
    parser.add_argument("--ranks", required=True, type=int)
    parser.add_argument("--threads-per-rank", default=1, type=int)
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    args = parser.parse_args()
    form = f"keepstill: {args.run}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    if "KEEPSTILL_TELL_FD" in os.environ:
        terminal = os.fdopen(int(os.environ["KEEPSTILL_TELL_FD"]), "w", closefd=False)
        handler = logging.StreamHandler(terminal)
        handler.setFormatter(logging.Formatter(form))
        logging.getLogger().addHandler(handler)
    try:
        become(args.command, args.ranks, args.threads_per_rank)
    except KeepstillError as error:
        print(f"keepstill: {args.run}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
