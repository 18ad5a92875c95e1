"""Realign one staged run, as one rank of N: under N > 1 a launcher starts N of these."""

import argparse
import logging
import sys
from pathlib import Path

from keepstill.settings import RealignSettings
from keepstill.start import start_quickly


def main() -> None:
    """Parse, then realign; a rank that fails ends all, with its own message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--settings", required=True, metavar="JSON")
    parser.add_argument("--ranks", required=True, type=int, metavar="N")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = RealignSettings.from_json(args.settings)
    start_quickly()
    from keepstill import ranks
    from keepstill.realign import Crew
    from keepstill.warm import ensure_warm

    def work(world: ranks.Alone | ranks.World) -> None:
        ranks.log_ranks(world)
        ranks.on_first(world, ensure_warm)
        ranks.realign_staged(args.stage_dir, settings, world, Crew(ranks.n_threads_of(world)))

    sys.exit(ranks.run_in_world(args.ranks, work))


if __name__ == "__main__":
    main()
