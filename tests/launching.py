"""Copies of launch/ to run, with programs that pretend to be clouds or without."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tiny import ROOT

# Stands for every program below. A pod has two workers for each node; they are folders, in which
# its commands really run.
FAKE = r"""#!/usr/bin/env bash
name=${0##*/}
(IFS=$'\x1f' && printf '%s\x1e' "$name"$'\x1f'"$*") >>"$FAKES/calls"
for flag in "$@"; do
    case $flag in
    --worker=*) worker=${flag#*=} ;;
    --command=*) command=${flag#*=} ;;
    --node-count=*) count=${flag#*=} ;;
    esac
done
on_workers() {
    local folder
    for folder in "$FAKES/workers/$1-"*; do
        [[ $worker == all || $folder == *-"$worker" ]] || continue
        (cd "$folder" && HOME=$folder bash -c "$2") &
    done
    wait
}
case "$name $*" in
"gcloud compute tpus queued-resources list"*)
    [[ ! -e $FAKES/offline ]] || { echo "no network" >&2; exit 1; }
    [[ ! -s $FAKES/state ]] || echo "pod $(head -n 1 "$FAKES/state")"
    [[ $(wc -l <"$FAKES/state") -lt 2 ]] || sed -i 1d "$FAKES/state"
    ;;
"gcloud compute tpus queued-resources create"*)
    printf 'WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n' >"$FAKES/state"
    nodes=pod
    [[ -z $count ]] || nodes=$(seq -f pod-%g 0 $((count - 1)))
    for node in $nodes; do mkdir -p "$FAKES/workers/$node-0" "$FAKES/workers/$node-1"; done
    ;;
"gcloud compute tpus queued-resources delete"*)
    for pid in "$FAKES"/workers/*/lasad_jax/.worker/pid; do kill -KILL -- "-$(cat "$pid")"; done
    rm -r "$FAKES/workers" && : >"$FAKES/state"
    ;;
"gcloud compute tpus tpu-vm describe"*) echo 2 ;;
"gcloud compute tpus tpu-vm ssh"*) on_workers "$5" "$command" ;;
"gcloud compute tpus tpu-vm scp"*) on_workers "${6%%:*}" "cp $5 ${6#*:}" ;;
"python3"*" -c "*) [[ ! -e $FAKES/old ]] ;;
"python3 -m venv .venv" | "uv venv"*)
    mkdir -p .venv/bin && ln -s "$0" .venv/bin/python && : >.venv/bin/activate
    ;;
"mountpoint"*) [[ ! -e $FAKES/unmounted ]] ;;
"kubectl apply"*) cat >"$FAKES/applied" ;;
"kubectl get pods"*--output=name) printf 'pod/run-slice-0-0\npod/run-slice-0-1\n' ;;
"kubectl logs"*) echo "log of $2" ;;
"squeue"*) cat "$FAKES/job" ;;
"srun"*) exit "$(cat "$FAKES/srun")" ;;
esac
"""
PROGRAMS = (
    "gcloud xpk kubectl docker sbatch srun squeue scontrol sudo mountpoint "
    "python3 python3.11 python3.12 python3.13 uv"
)


class Tree:
    """A copy of launch/ beside an environment that is there already.

    Attributes:
      root: of the copy.
      environment: of the launchers.
    """

    def __init__(self, folder: Path):
        self.root = folder / "tree"
        self.environment = os.environ | {"TMPDIR": str(folder), "PAUSE": "0"}
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", ".gitignore"):
            shutil.copy(ROOT / name, self.root)
        made = self.root / ".venv"
        (made / "bin").mkdir(parents=True)
        executable(made / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (made / "bin/activate").write_text(f'PATH="{made}/bin:$PATH"\n')
        for name in ("requirements.txt", "launch/requirements-cuda13.txt"):
            shutil.copy(ROOT / name, made / f"installed-{name.replace('/', '-')}")

    def start(self, script: str, *arguments, **environment) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / "launch" / script), *map(str, arguments)],
            env=self.environment | environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, script: str, *arguments, status: int = 0, **environment) -> str:
        """What a launcher says, which must end with `status`."""
        process = self.start(script, *arguments, **environment)
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == status, said
        return said


class FalseTree(Tree):
    """One whose clouds are false.

    Attributes:
      fakes: folder of what they keep.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.fakes = folder / "fakes"
        programs = self.fakes / "bin"
        programs.mkdir(parents=True)
        for name in PROGRAMS.split():
            executable(programs / name, FAKE)
        (self.fakes / "state").touch()
        path = f"{programs}:{os.environ['PATH']}"
        self.environment |= {"PATH": path, "FAKES": str(self.fakes)}

    def calls(self) -> list[list[str]]:
        """Those since the last time, as words."""
        file = self.fakes / "calls"
        if not file.exists():
            return []
        calls = file.read_text().split("\x1e")[:-1]
        file.unlink()
        return [call.split("\x1f") for call in calls]


def words(*calls: str) -> list[list[str]]:
    """Calls as `FalseTree.calls` gives them."""
    return [shlex.split(call) for call in calls]


def executable(path: Path, text: str):
    path.write_text(text)
    path.chmod(0o755)
