# shellcheck shell=bash
# Sourced by the launchers beside it: messages, dry runs, the command to launch.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
    echo "bash is $BASH_VERSION; the launchers need 4.4 or later" >&2
    exit 2
}

# Says what is wrong in one line.
fail() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# Prints the comment at the head of the script.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Splits the arguments at --: what stands before goes to `flags`, what follows to `command`.
# A command of this library is told to join the other processes.
split_command() {
    flags=() command=()
    while [[ $# -gt 0 && $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    [[ $# -gt 0 ]] && command=("${@:2}")
    case " ${command[*]} " in
    *" --distributed"* | *" --nodistributed"*) ;;
    *" lasad_jax."*) command+=(--distributed) ;;
    esac
}

# The value of --name=value.
value() {
    [[ $1 == *=?* ]] || fail "${1%%=*}: give it a value: ${1%%=*}=VALUE"
    echo "${1#*=}"
}

# A command line as a shell reads it.
quoted() {
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

# Runs a command, or with DRY_RUN=1 prints it.
call() {
    if [[ ${DRY_RUN:-} ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# The same for a line of shell.
call_shell() {
    if [[ ${DRY_RUN:-} ]]; then
        echo "$1"
    else
        bash -euo pipefail -c "$1"
    fi
}
