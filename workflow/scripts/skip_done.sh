#!/usr/bin/env bash
# Stands in for guard.sh where a cluster job is tried again and the run was finished before: makes
# the files that Snakemake looks for, and says so in the log, which Snakemake has emptied.
#   skip_done.sh LOG STAGE_DIR COMMAND...
set -eu
mkdir -p "$2"
touch "$2/staged.json" "$2/motion.npz"
echo "done by an earlier attempt" >"$1"
