#!/bin/sh
# What became of a Slurm job: running, success or failed.
#   status.sh JOB
if ! state=$(squeue --noheader --states=all --format=%T --jobs "$1" 2>&1); then
    case $state in
        *"Invalid job id"*) state=FORGOTTEN ;;
        *) state=UNKNOWN ;; # the controller is busy or away
    esac
fi
case $state in
    COMPLETED) echo success ;;
    "" | FORGOTTEN | BOOT_FAIL | CANCELLED | DEADLINE | FAILED | NODE_FAIL | OUT_OF_MEMORY | PREEMPTED | TIMEOUT)
        echo failed
        ;;
    *) echo running ;;
esac
