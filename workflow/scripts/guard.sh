#!/usr/bin/env bash
# Runs a job's command with all its output in a log, and tells the log's last word for the user.
# Should it fail, what the run has staged goes, so that failures fill no memory, and the log ends
# with the exit status, by which the end of a study finds what failed.
#   guard.sh LOG STAGE_DIR COMMAND...      (STAGE_DIR may be empty)
set -u
log=$1
stage_dir=$2
shift 2

finish() {
    status=$?
    if [ "$status" -ne 0 ] && [ -d "$stage_dir" ]; then
        python "$(dirname "$0")/unstage_run.py" "$stage_dir"
    fi
    case $status in
        130 | 143) return ;; # interrupted, which is no failure of the run
    esac
    last_word=$(grep '^keepstill: ' "$log" | tail -n 1)
    if [ "$status" -ne 0 ]; then
        echo "exit status $status" >>"$log"
        last_word=${last_word:-"keepstill: exit status $status; see $log"}
    else
        echo "CPU time, user and system, of this script and then of the command:" >>"$log"
        times >>"$log"
    fi
    [ -z "$last_word" ] || echo "$last_word" >&2
}

trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
exec 3>&2 # the terminal, for what should be told at once
export KEEPSTILL_TELL_FD=3
"$@" >"$log" 2>&1
