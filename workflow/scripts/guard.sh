#!/usr/bin/env bash
# Runs a job's command with all its output in a log, and tells the log's last word for the user.
# Should it fail, what the run has staged goes, so that failures fill no memory, and the log ends
# with the exit status, by which the end of a study finds what failed.
#   guard.sh LOG STAGE_DIR COMMAND...      (STAGE_DIR may be empty)
set -u
log=$1
stage_dir=$2
log_bytes=65536 # more than any job has to say
shift 2

# Room for the log is taken before the work, lest a disk that fills meanwhile swallow the reason.
make_log() {
    : >"$log" &&
        { fallocate --keep-size --length $log_bytes "$log" ||
            { head -c $log_bytes /dev/zero >"$log" && : >"$log"; }; }
} 2>/dev/null

# What the log did not need goes back.
trim_log() {
    truncate -s "$(stat -c %s "$log")" "$log"
} 2>/dev/null

finish() {
    status=$?
    if [ "$status" -ne 0 ] && [ -d "$stage_dir" ]; then
        python "$(dirname "$0")/unstage_run.py" "$stage_dir"
    fi
    case $status in
        129 | 130 | 143 | 15) return ;; # told to end (15: as mpirun says it), which is no failure
    esac
    if [ -n "$no_log" ]; then
        echo "$no_log" >&2
        return
    fi
    if [ "$status" -ne 0 ]; then
        last_word=$(grep '^keepstill: ' "$log" | grep -v -e ': warning: ' -e ': waiting for ' | tail -n 1)
        echo "exit status $status" >>"$log"
        last_word=${last_word:-"keepstill: exit status $status; see $log"}
    else
        last_word=$(grep '^keepstill: ' "$log" | tail -n 1)
        echo "CPU time, user and system, of this script and then of the command:" >>"$log"
        times >>"$log"
    fi
    trim_log
    [ -z "$last_word" ] || echo "$last_word" >&2
}

no_log=
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
if ! make_log; then
    no_log="keepstill: $(basename "$log" .log): no room for its log, $log; free space there or choose another output_dir"
    exit 2
fi
exec 3>&2 # the terminal, for what should be told at once
export KEEPSTILL_TELL_FD=3
"$@" >>"$log" 2>&1
