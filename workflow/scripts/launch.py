"""Start a run's ranks on cores of their own: lease the cores, fill `{cores}`, become the command.

With `--log`, everything the command and this script say goes to that file.
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
    parser.add_argument("--log", metavar="FILE")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    args = parser.parse_args()
    if args.log:
        log_file = os.open(args.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log_file, sys.stdout.fileno())
        os.dup2(log_file, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format=f"{args.run}: %(message)s")
    try:
        become(args.command, args.ranks, args.threads_per_rank)
    except KeepstillError as error:
        print(f"keepstill: {args.run}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
