# What the study's rules and the ladder's share: where the engine is, and how things are said.
import os
import sys
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake.logging import logger

RULES = Path(workflow.current_basedir.get_path_or_uri(secret_free=True))
CLONE, SCRIPTS = RULES.parents[1], RULES.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from keepstill.errors import KeepstillError

# Jobs speak for themselves, in one line each; of a failed command its log has more to say.
NOISE = ("Select jobs", "Execute ", "RuleException:\nCalledProcessError")
logger.addFilter(lambda record: not str(record.msg).startswith(NOISE))
N_CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
# python and mpirun are those of this environment, activated or not; conda puts its own before.
os.environ.update(PATH=f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}")


def or_refuse(function, *args):
    """The function's value; a user's error ends in one line instead of a traceback."""
    try:
        return function(*args)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def script(name):
    return str(SCRIPTS / name)


def is_called_for(target):
    """Whether this target is all that Snakemake was called for."""
    if target not in sys.argv[1:]:
        return False
    called, _ = get_argument_parser().parse_known_args(sys.argv[1:])
    return set(called.targets or ()) == {target}
