#!/bin/sh
# Puts the engine of the clone in the current directory into the active conda environment.
# A relative path in keepstill.yaml would not do: Snakemake builds from a copy of that file.
set -eu
: "${CONDA_PREFIX:?activate the conda environment keepstill-itk first}"
if ! grep -q '^name = "keepstill"' pyproject.toml 2>/dev/null; then
    echo "keepstill: $PWD is no clone of keepstill; start from the clone's directory" >&2
    exit 2
fi
python -m pip install --quiet --no-deps --no-build-isolation --editable .
