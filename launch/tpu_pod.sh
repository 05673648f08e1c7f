#!/usr/bin/env bash
# Trains on a TPU pod that is asked for through a queued resource.
#
#   bash launch/tpu_pod.sh up POD --zone=ZONE --type=v5litepod-256 [options] -- COMMAND
#
# does all of it: asks for the pod, waits, copies the working tree to every worker, makes the
# environment there, runs the command on all of them and waits for its end, with a log for each
# worker. When the pod is taken away (a spot pod often is) it begins anew, and the command goes on
# from its last checkpoint. Run again at any time, it takes up what it finds. The steps alone:
#
#   create POD    asks for the pod
#   wait POD      until it is there
#   setup POD     the working tree and the environment, on every worker
#   run POD       starts the command on every worker and waits for its end: -- COMMAND
#   status POD    of the queued resource and of every worker
#   logs POD      fetches the worker's logs to logs/POD/
#   stop POD      SIGTERM on every worker: a trainer saves, and the same command goes on
#   delete POD    gives the pod back
#
#   --zone=ZONE       always needed; --project=PROJECT where gcloud's own is another
#   --type=TYPE       such as v5litepod-256, v5p-128, v6e-64
#   --runtime=NAME    the workers' image; chosen by the type
#   --spot            cheaper, and may be taken away at any time
#   --slices=N        1: pods of this type, joined over the data-centre network
#   --shared=SERVER:/PATH   an NFS share that setup mounts on every worker as runs/,
#                     so that --workdir=runs/NAME is seen by all
#   --every=SECONDS   60: how often to look
#
# The command runs in the background of the workers, in ~/lasad_jax: losing this script or its
# connection does not stop it, and `run` follows it again. DRY_RUN=1 prints the calls.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

# ---- Queued resource

create() {
    [[ $type ]] || fail "--type: name one, such as v5litepod-256"
    local image=$runtime nodes=(--node-id="$pod")
    ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$pod")
    if [[ ! $image ]]; then
        case $type in
        v5litepod-*) image=v2-alpha-tpuv5-lite ;;
        v5p-*) image=v2-alpha-tpuv5 ;;
        v6e-*) image=v2-alpha-tpuv6e ;;
        v4-*) image=tpu-ubuntu2204-base ;;
        *) fail "--type: no image is known for '$type'; name one by --runtime" ;;
        esac
    fi
    call gcloud compute tpus queued-resources create "$pod" "${place[@]}" "${nodes[@]}" \
        --accelerator-type="$type" --runtime-version="$image" ${spot:+--spot}
}

LIST=(--format='value(name.basename(),state.state)')

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...; nothing if there is none.
# That gcloud cannot say (no network, no rights) is an error, not the same as none.
state() {
    local all
    all=$(gcloud compute tpus queued-resources list "${place[@]}" "${LIST[@]}") || return
    awk -v pod="$pod" '$1 == pod {print $2}' <<<"$all"
}

wait_for_pod() {
    if [[ ${DRY_RUN:-} ]]; then
        echo "# every $every s, until it is ACTIVE:"
        call gcloud compute tpus queued-resources list "${place[@]}" "${LIST[@]}"
        return
    fi
    local now
    while true; do
        now=$(state) || now=unknown
        case $now in
        ACTIVE) return ;;
        '' | FAILED | SUSPEND* | DELETING)
            echo "$pod: ${now:-there is no such pod}"
            return 1
            ;;
        esac
        echo "$(date +%T) $pod: $now"
        sleep "$every"
    done
}

delete() {
    call gcloud compute tpus queued-resources delete "$pod" "${place[@]}" --force --quiet
}

# ---- Workers

# The nodes, one for each slice.
nodes() {
    if ((slices == 1)); then
        echo "$pod"
    else
        for ((slice = 0; slice < slices; slice++)); do
            echo "$pod-$slice"
        done
    fi
}

on() {
    call gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" --worker="$2" --command="$3"
}

# A line of shell on all workers of all nodes at once.
on_workers() {
    local node pids=() status=0
    for node in $(nodes); do
        if [[ ${DRY_RUN:-} ]]; then
            on "$node" all "$1"
        else
            on "$node" all "$1" &
            pids+=($!)
        fi
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || status=$?
    done
    return "$status"
}

setup() {
    local node archive=${TMPDIR:-/tmp}/lasad_jax-$pod.tar.gz prepare
    # The working tree as it is now, without what git ignores.
    call_shell "git ls-files -z --cached --others --exclude-standard |
    tar -czf $(quoted "$archive") --null -T -" || return
    for node in $(nodes); do
        call gcloud compute tpus tpu-vm scp "$archive" "$node:lasad_jax.tar.gz" \
            "${place[@]}" --worker=all || return
    done
    prepare='mkdir -p lasad_jax/runs && tar -xzf lasad_jax.tar.gz -C lasad_jax && cd lasad_jax'
    [[ $shared ]] && prepare+=" && { mountpoint -q runs || {
    sudo apt-get -qq update && sudo apt-get -qq install nfs-common &&
    sudo mount -t nfs $(quoted "$shared") runs; }; } && { [ -w runs ] || sudo chmod a+rwx runs; }"
    # Where the image's Python is before 3.11, uv gets a newer one.
    prepare+=" && export PATH=~/.local/bin:\$PATH &&
{ python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    python3 -m pip install --quiet --user uv; } &&
bash -euc 'source launch/environment.sh requirements.txt launch/requirements-tpu.txt'"
    on_workers "$prepare"
}

# What the first worker says of the command; when it has ended there, it has everywhere.
look() {
    on "$(nodes | head -n 1)" 0 'cd lasad_jax 2>/dev/null && bash launch/worker.sh status || true'
}

# Starts the command, or finds it running, and waits for its end. 0: it is done. 1: it failed.
# 2: the pod is gone, or has been started anew.
run() {
    [[ ${#command[@]} -gt 0 ]] || fail "no command; it follows after --"
    on_workers "bash lasad_jax/launch/worker.sh start $(quoted "${command[@]}")" || return 2
    if [[ ${DRY_RUN:-} ]]; then
        echo "# every $every s, until it has ended:"
        look
        logs
        return
    fi
    local now
    while true; do
        # A worker that cannot be reached is asked again, unless the pod is gone.
        now=$(look) || now=unreachable
        case $now in
        'ended '*)
            # The others end by now; after a failure, whatever they are at.
            if [[ $now == 'ended 0' ]]; then
                on_workers 'bash lasad_jax/launch/worker.sh wait 60' || true
            else
                stop || true
            fi
            logs
            echo "$pod: $now; logs/$pod/ has the logs"
            [[ $now == 'ended 0' ]]
            return
            ;;
        '') return 2 ;;
        esac
        now=$(state) || now=ACTIVE
        [[ $now == ACTIVE ]] || return 2
        sleep "$every"
    done
}

logs() {
    local node worker count=1 file
    for node in $(nodes); do
        local counting=(gcloud compute tpus tpu-vm describe "$node" "${place[@]}"
            --format='value(networkEndpoints.len())')
        call "${counting[@]}"
        [[ ${DRY_RUN:-} ]] || count=$("${counting[@]}") || return
        # One by one: gcloud's --output-directory does not give a log for each worker.
        for ((worker = 0; worker < count; worker++)); do
            if [[ ${DRY_RUN:-} ]]; then
                on "$node" "$worker" 'bash lasad_jax/launch/worker.sh log'
                continue
            fi
            file=logs/$pod/$node-$worker.log
            mkdir -p "logs/$pod"
            on "$node" "$worker" 'bash lasad_jax/launch/worker.sh log' >"$file.part" &&
                mv "$file.part" "$file" || echo "$file: the worker cannot be reached"
        done
    done
}

status() {
    [[ ${DRY_RUN:-} ]] || echo "$pod: $(state)"
    # shellcheck disable=SC2016
    on_workers 'echo $(hostname): $(bash lasad_jax/launch/worker.sh status)'
}

stop() {
    on_workers 'bash lasad_jax/launch/worker.sh stop'
}

# ---- All of it

up() {
    [[ ${#command[@]} -gt 0 ]] || fail "no command; it follows after --"
    if [[ ${DRY_RUN:-} ]]; then
        create
        wait_for_pod
        setup
        run
        return
    fi
    state >/dev/null # What is wrong with gcloud shows at once.
    local now before=unseen ended
    while true; do
        now=$(state) || now=unknown
        [[ $now == "$before" ]] || echo "$(date +%T) $pod: ${now:-none}"
        before=$now
        case $now in
        '') create ;;
        FAILED | SUSPENDED) delete ;;
        ACTIVE)
            ended=0
            # Nothing is copied under the feet of a command that runs.
            if [[ $(look) != running ]] && ! setup; then
                ended=1
            else
                run || ended=$?
            fi
            # Whatever it was, if the pod is gone, that is why.
            now=$(state) || now=ACTIVE
            [[ $now != ACTIVE || $ended == 2 ]] || return "$ended"
            sleep "$every"
            ;;
        *) sleep "$every" ;;
        esac
    done
}

split_command "$@"
action=${flags[0]:-} pod=${flags[1]:-}
zone='' project='' type='' runtime='' spot='' slices=1 shared='' every=60
for flag in "${flags[@]:2}"; do
    case $flag in
    --zone=*) zone=$(value "$flag") ;;
    --project=*) project=$(value "$flag") ;;
    --type=*) type=$(value "$flag") ;;
    --runtime=*) runtime=$(value "$flag") ;;
    --spot) spot=1 ;;
    --slices=*) slices=$(value "$flag") ;;
    --shared=*) shared=$(value "$flag") ;;
    --every=*) every=$(value "$flag") ;;
    *) fail "unknown option '$flag'; see --help" ;;
    esac
done
case $action in
--help | '') usage && exit ;;
create | wait | setup | run | status | logs | stop | delete | up) ;;
*) fail "unknown action '$action'; see --help" ;;
esac
[[ $pod && $pod != -* ]] || fail "$action: name the pod"
[[ $zone ]] || fail "--zone: name one, such as us-west4-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices: '$slices' must be a number from 1"
place=(--zone="$zone" ${project:+--project="$project"})
case $action in
wait) wait_for_pod ;;
*) "$action" ;;
esac
