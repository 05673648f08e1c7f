#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: bash launch/gke.sh ACTION ...
#
#   cluster CLUSTER --zone=ZONE --type=TYPE [--slices=N] [-- flags of xpk cluster create]
#                   makes a cluster with N slices; JobSet and a queue come with it (xpk)
#   image IMAGE     builds this working tree and its environment as IMAGE and pushes it (docker)
#   run NAME --type=TYPE --image=IMAGE --shared=SERVER:/PATH [--slices=N] -- COMMAND
#                   starts a run: a JobSet of launch/jobset.yaml, one process for each host
#   status NAME     of the run and its pods
#   logs NAME       writes a log for each pod to logs/NAME/
#   stop NAME       SIGTERM to every process: a trainer saves, and the same `run` goes on
#   delete CLUSTER --zone=ZONE
#
#   --type=TYPE     such as v5litepod-256, v5p-128, v6e-64
#   --topology=AxB  where the type's usual one is not meant
#   --slices=N      1; several are joined over the data-centre network
#   --shared=SERVER:/PATH   an NFS share (Filestore), which every process sees as runs/
#   --restarts=N    3: after so many failures that are no preemption the run is given up
#   --queue=NAME    multislice-queue, as xpk calls its queue
#   --project=PROJECT, --zone=ZONE, and --spot or --reservation=NAME for a new cluster
#
# The command runs in /lasad_jax of the image. DRY_RUN=1 prints the calls.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

# ---- What a type is made of

# Sets `accelerator`, `topology`, `hosts` of a slice and `chips` of a host.
describe_type() {
    local chip=${type%-*} size=${type##*-} all=1 side
    case $chip in
    v5litepod) accelerator=tpu-v5-lite-podslice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    v5p) accelerator=tpu-v5p-slice size=$((size / 2)) ;; # Named by cores, two to a chip.
    v4) accelerator=tpu-v4-podslice size=$((size / 2)) ;;
    *) fail "--type: '$type' is none of v5litepod-N, v5p-N, v6e-N, v4-N" ;;
    esac
    if [[ ! $topology ]]; then
        case $chip:$size in
        v5litepod:8 | v6e:8) topology=2x4 ;;
        v5litepod:16 | v6e:16) topology=4x4 ;;
        v5litepod:32 | v6e:32) topology=4x8 ;;
        v5litepod:64 | v6e:64) topology=8x8 ;;
        v5litepod:128 | v6e:128) topology=8x16 ;;
        v5litepod:256 | v6e:256) topology=16x16 ;;
        v6e:1) topology=1x1 ;;
        v6e:4) topology=2x2 ;;
        v5p:4 | v4:4) topology=2x2x1 ;;
        v5p:8 | v4:8) topology=2x2x2 ;;
        v5p:16 | v4:16) topology=2x2x4 ;;
        v5p:32 | v4:32) topology=2x4x4 ;;
        v5p:64 | v4:64) topology=4x4x4 ;;
        v5p:128 | v4:128) topology=4x4x8 ;;
        v5p:256 | v4:256) topology=4x8x8 ;;
        v5p:512 | v4:512) topology=8x8x8 ;;
        *) fail "--type: the topology of '$type' is not known here; name it by --topology" ;;
        esac
    fi
    for side in ${topology//x/ }; do
        all=$((all * side))
    done
    ((all == size)) || fail "--topology: $topology has $all chips, $type $size"
    chips=$((size < 4 ? size : 4))
    hosts=$((size / chips))
}

# ---- Actions

cluster() {
    describe_type
    call xpk cluster create --cluster="$name" "${place[@]}" --tpu-type="$type" \
        --num-slices="$slices" "${capacity[@]}" "${command[@]}"
}

delete() {
    call xpk cluster delete --cluster="$name" "${place[@]}"
}

image() {
    call docker build --platform=linux/amd64 --file=launch/Dockerfile --tag="$name" .
    call docker push "$name"
}

# A list as JSON, which is YAML.
json() {
    local word list=''
    for word in "$@"; do
        [[ $word != *[[:cntrl:]]* ]] || fail "a control character in the command: $(quoted "$word")"
        word=${word//\\/\\\\}
        list+=", \"${word//\"/\\\"}\""
    done
    echo "[${list#, }]"
}

jobset() {
    local yaml list entry
    yaml=$(<launch/jobset.yaml)
    list=$(json "${command[@]}") || return
    for entry in NAME="$name" QUEUE="$queue" RESTARTS="$restarts" SLICES="$slices" \
        HOSTS="$hosts" GRACE=120 ACCELERATOR="$accelerator" TOPOLOGY="$topology" \
        IMAGE="$image" CHIPS="$chips" SERVER="${shared%%:*}" SHARE="${shared#*:}" \
        COMMAND="$list"; do
        yaml=${yaml//"\${${entry%%=*}}"/"${entry#*=}"}
    done
    echo "$yaml"
}

run() {
    [[ ${#command[@]} -gt 0 ]] || fail "no command; it follows after --"
    [[ $image ]] || fail "--image: name what 'gke.sh image' has pushed"
    [[ $shared == *:/* ]] || fail "--shared: '$shared' must be SERVER:/PATH"
    describe_type
    local yaml
    yaml=$(jobset)
    if [[ ${DRY_RUN:-} ]]; then
        echo "kubectl apply --filename=- <<END"
        echo "$yaml"
        echo END
    else
        kubectl apply --filename=- <<<"$yaml"
    fi
}

status() {
    call kubectl get jobset "$name"
    call kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

logs() {
    local pods=(kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name"
        --output=name) pod all
    if [[ ${DRY_RUN:-} ]]; then
        call "${pods[@]}"
        echo "kubectl logs POD > logs/$name/POD.log # for each"
        return
    fi
    all=$("${pods[@]}")
    mkdir -p "logs/$name"
    for pod in $all; do
        kubectl logs "$pod" >"logs/$name/${pod#pod/}.log" || echo "$pod: has no log"
    done
}

stop() {
    call kubectl delete jobset "$name" --cascade=foreground
}

split_command "$@"
action=${flags[0]:-} name=${flags[1]:-}
zone='' project='' type='' topology='' image='' shared='' slices=1 restarts=3
queue=multislice-queue capacity=(--on-demand)
for flag in "${flags[@]:2}"; do
    case $flag in
    --zone=*) zone=$(value "$flag") ;;
    --project=*) project=$(value "$flag") ;;
    --type=*) type=$(value "$flag") ;;
    --topology=*) topology=$(value "$flag") ;;
    --image=*) image=$(value "$flag") ;;
    --shared=*) shared=$(value "$flag") ;;
    --slices=*) slices=$(value "$flag") ;;
    --restarts=*) restarts=$(value "$flag") ;;
    --queue=*) queue=$(value "$flag") ;;
    --spot | --reservation=*) capacity=("$flag") ;;
    *) fail "unknown option '$flag'; see --help" ;;
    esac
done
case $action in
--help | '') usage && exit ;;
cluster | image | run | status | logs | stop | delete) ;;
*) fail "unknown action '$action'; see --help" ;;
esac
[[ $name && $name != -* ]] || fail "$action: name it"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices: '$slices' must be a number from 1"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts: '$restarts' must be a number from 0"
place=()
if [[ $action == cluster || $action == delete ]]; then
    [[ $zone ]] || fail "--zone: name one, such as us-west4-a"
    place=(--zone="$zone" ${project:+--project="$project"})
fi
if [[ $action == cluster || $action == run ]]; then
    [[ $type ]] || fail "--type: name one, such as v5litepod-256"
fi
"$action"
