r"""Where the time of one `keepstill realign` goes, from samples of its stacks.

    pip install py-spy
    py-spy record -r 500 -f raw -o samples.txt -- \
        keepstill realign RUN --out OUT --dtype int16 --threads 1
    python benchmarks/split.py samples.txt

A line of samples is a stack, outermost call first, and how often it was seen. The innermost call
that is named below says what a sample belongs to.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

STAGES = {
    "read": ("stage_run", "volume", "_volume"),
    "reference": ("choose_target",),
    "first estimate": ("estimate",),
    "run's model": ("_fit_model", "right_of", "sums_of", "residuals", "write_residuals"),
    "last step": ("take_last_step", "finish"),
    "reslice": ("_reslice",),
    "write": ("_deflated", "put_nifti", "gzip_member"),
    "figures, maps, tables": ("collect_run",),
}
REST = "start-up"
_CALL = re.compile(r"([^.;(]+) \([^;]*\)$")


def stage_of(stack: str) -> str:
    """Stage that a stack belongs to."""
    for call in reversed(stack.split(";")):
        found = _CALL.search(call)
        for stage, names in STAGES.items():
            if found and found[1] in names:
                return stage
    return REST


def split(lines: Iterable[str]) -> Counter[str]:
    """Number of samples of each stage."""
    out: Counter[str] = Counter()
    for line in lines:
        stack, _, n = line.rpartition(" ")
        out[stage_of(stack)] += int(n)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path)
    found = split(parser.parse_args().samples.read_text().splitlines())
    for stage, n in found.most_common():
        print(f"{stage:<24}{n / found.total():6.1%}")
