"""Remove all that one run has staged."""

import sys
from pathlib import Path

from keepstill.stage import remove_stage

if __name__ == "__main__":
    remove_stage(Path(sys.argv[1]))
