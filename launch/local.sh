#!/usr/bin/env bash
# Runs a command in several processes of this machine, which find each other over loopback.
#
#   bash launch/local.sh --processes=2 [options] -- python -m lasad_jax.train ...
#
#   --processes=N   how many
#   --devices=N     CPU devices of each, where there is no accelerator
#   --gpus          one GPU for each process
#   --logs=DIR      logs/local: a log for each process
#
# Ends with 0 when all do; if one fails the others are stopped, and its status is this one's.
# SIGTERM and Ctrl-C go to every process: a trainer saves and ends with 75, which says that the
# same command goes on. DRY_RUN=1 prints what would be run.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "bash is $BASH_VERSION, which is before 5.1"

split_command "$@"
processes='' devices='' gpus='' logs=logs/local
for flag in "${flags[@]}"; do
    case $flag in
    --help) usage && exit ;;
    --processes=*) processes=$(value "$flag") ;;
    --devices=*) devices=$(value "$flag") ;;
    --logs=*) logs=$(value "$flag") ;;
    --gpus) gpus=1 ;;
    *) fail "unknown option '$flag'; see --help" ;;
    esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes: '$processes' must be a number from 1"
[[ $devices =~ ^([1-9][0-9]*)?$ ]] || fail "--devices: '$devices' must be a number from 1"
[[ ${#command[@]} -gt 0 ]] || fail "no command; it follows after --"
source launch/environment.sh requirements.txt

port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
settings=(JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes")
[[ $gpus ]] || settings+=(JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
[[ $devices ]] && settings+=(
    JAX_PLATFORMS=cpu
    XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
)
[[ ${DRY_RUN:-} ]] || mkdir -p "$logs"

running=() stopped=''
stop() {
    ((${#running[@]} == 0)) || kill -TERM "${running[@]}" 2>/dev/null || true
}
trap 'stopped=1; stop' TERM INT
for ((process = 0; process < processes; process++)); do
    own=(JAX_PROCESS_ID="$process" ${gpus:+CUDA_VISIBLE_DEVICES="$process"})
    if [[ ${DRY_RUN:-} ]]; then
        echo "$(quoted env "${settings[@]}" "${own[@]}" "${command[@]}") > $logs/$process.log"
    else
        env "${settings[@]}" "${own[@]}" "${command[@]}" >"$logs/$process.log" 2>&1 &
        running+=($!)
    fi
done
((${#running[@]} == 0)) || echo "Logs: $logs/0.log to $logs/$((processes - 1)).log"

# The first process that fails decides; those that are stopped for it do not.
result=0
while ((${#running[@]} > 0)); do
    ended='' status=0
    wait -n -p ended "${running[@]}" || status=$?
    [[ ${ended:-} ]] || continue # A signal came.
    left=()
    for pid in "${running[@]}"; do
        [[ $pid == "$ended" ]] || left+=("$pid")
    done
    running=("${left[@]}")
    if ((status != 0 && result == 0)); then
        result=$status
        [[ $stopped ]] || stop
    fi
done
exit "$result"
