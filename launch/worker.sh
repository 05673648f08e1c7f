#!/usr/bin/env bash
# One worker of a pod: runs a command that outlives the connection it was started over.
#
#   bash launch/worker.sh start COMMAND...   begins; where it is running already, does nothing
#   bash launch/worker.sh status             running, ended STATUS, or nothing
#   bash launch/worker.sh log                everything the command has said
#   bash launch/worker.sh wait SECONDS       until the command has ended, at most so long
#   bash launch/worker.sh stop               SIGTERM, after five minutes SIGKILL; waits for the end
#
# A command that ends with 75 (saved after SIGTERM; run the same command again) is run again at
# once. After any other failure it is run again up to RETRIES times in a row (3): when one
# worker of a pod breaks down, all fail, and must meet again.
set -euo pipefail
cd "$(dirname "$0")/.."
here=.worker

# The lock is held by whatever of a command is alive, and goes when the last of it does.
running() {
    ! flock --nonblock "$here/lock" true
}

# In the background: the command, again and again.
keep_running() {
    local child='' stopped='' signalled='' status failures=0 started
    trap 'stopped=1 signalled=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
    # shellcheck disable=SC1091
    source .venv/bin/activate
    while true; do
        started=$SECONDS
        "$@" &
        child=$!
        # A signal ends `wait` before the command has ended.
        while true; do
            signalled='' status=0
            wait "$child" || status=$?
            [[ $signalled ]] || break
        done
        echo "$(date --utc +%FT%TZ) ended with $status"
        [[ -z $stopped && $status != 0 ]] || break
        if ((status != 75)); then
            # After ten minutes of work it is another failure, not the same one again.
            ((SECONDS - started < 600)) || failures=0
            ((++failures <= ${RETRIES:-3})) || break
            sleep "${PAUSE:-10}"
        fi
    done
    echo "$status" >"$here/ended"
}

wait_for_end() {
    local since=$SECONDS
    while running && ((SECONDS - since < $1)); do sleep 0.1; done
}

mkdir -p "$here"
touch "$here/lock"
case ${1:-} in
start)
    exec 9>"$here/lock"
    # Whoever asks how it stands holds the lock for a moment.
    if ! flock --timeout 1 9; then
        echo "running already"
        exit
    fi
    rm -f "$here/ended"
    echo "$(date --utc +%FT%TZ) ${*:2}" >>"$here/log"
    setsid nohup bash launch/worker.sh keep_running "${@:2}" >>"$here/log" 2>&1 </dev/null &
    echo $! >"$here/pid"
    ;;
keep_running) keep_running "${@:2}" ;;
status)
    if running; then
        echo running
    elif [[ -e $here/ended ]]; then
        echo "ended $(cat "$here/ended")"
    fi
    ;;
log) cat "$here/log" ;;
wait) wait_for_end "$2" ;;
stop)
    if running; then
        kill -TERM "$(cat "$here/pid")" || true
        wait_for_end 300
        ! running || kill -KILL -- "-$(cat "$here/pid")"
    fi
    ;;
*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
esac
