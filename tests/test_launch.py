"""The launchers in common: their mistakes, environment and dry runs, what the pages say of them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import FalseTree, words
from tiny import ROOT

SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]


@pytest.fixture
def tree(tmp_path):
    return FalseTree(tmp_path)


def test_shellcheck_finds_nothing():
    subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--external-sources", *SCRIPTS],
        cwd=ROOT,
        check=True,
    )


def test_help_and_mistakes(tree):
    for script in ("local.sh", "tpu_pod.sh", "gke.sh", "slurm.sh"):
        said = tree(script, "--help")
        assert f"launch/{script}" in said
        assert "DRY_RUN=1" in said
    for call, message in (
        ("local.sh --processes=two -- ls", "--processes: 'two' must be a number from 1"),
        ("local.sh --processes=2", "no command; it follows after --"),
        ("local.sh --process=2 -- ls", "unknown option '--process=2'"),
        ("tpu_pod.sh stat pod --zone=z", "unknown action 'stat'"),
        ("tpu_pod.sh status --zone=z", "status: name the pod"),
        ("tpu_pod.sh status pod", "--zone: name one"),
        ("tpu_pod.sh status pod --zone=", "--zone: give it a value: --zone=VALUE"),
        ("tpu_pod.sh create pod --zone=z", "--type: name one"),
        ("tpu_pod.sh create pod --zone=z --type=h100-8", "no image is known for 'h100-8'"),
        ("tpu_pod.sh up pod --zone=z --type=v6e-8", "no command"),
        ("gke.sh run x --type=v5p-8 --image=i -- ls", "--shared: '' must be SERVER:/PATH"),
        ("gke.sh run x --type=v5p-8 --shared=s:/p -- ls", "--image: name what"),
        (
            "gke.sh run x --type=v5p-8 --topology=4x4 --image=i --shared=s:/p -- ls",
            "--topology: 4x4 has 16 chips, v5p-8 4",
        ),
        ("gke.sh cluster x --zone=z --type=a100-8", "'a100-8' is none of v5litepod-N"),
        ("slurm.sh --nodes=2", "no command"),
    ):
        said = tree(*call.split(), status=2)
        assert message in said, (call, said)
        assert said.count("\n") == 1
    assert tree.calls() == []


def test_where_python_is_too_old_uv_makes_the_environment(tree):
    shutil.rmtree(tree.root / ".venv")
    (tree.fakes / "old").touch()
    tree("local.sh", "--processes=1", "--", "true")
    asked = [call for call in tree.calls() if "-c" not in call]
    assert asked == words(
        "uv venv --quiet --seed --python 3.12 .venv",
        "python -m pip install --quiet --requirement requirements.txt",
    )


def test_dry_runs_call_nothing(tree):
    command = ("--", "python", "-m", "lasad_jax.train", "--workdir=runs/a")
    pod = ("pod", "--zone=z", "--type=v6e-8", "--shared=s:/p", "--slices=2")
    said = tree("tpu_pod.sh", "up", *pod, *command, DRY_RUN="1")
    order = ["create pod", "list", "tar", "scp", "ssh", "worker.sh\\ start", "worker.sh\\ status"]
    places = [said.index(step) for step in order]
    assert places == sorted(places)
    assert "lasad_jax.train\\ --workdir=runs/a\\ --distributed" in said
    for action in ("status", "logs", "stop", "delete", "wait", "setup"):
        assert "gcloud compute tpus" in tree("tpu_pod.sh", action, *pod, DRY_RUN="1")
    said = tree("local.sh", "--processes=2", "--gpus", *command, DRY_RUN="1", PORT="99")
    assert said.splitlines() == [
        "env JAX_COORDINATOR_ADDRESS=localhost:99 JAX_NUM_PROCESSES=2 "
        f"JAX_PROCESS_ID={i} CUDA_VISIBLE_DEVICES={i} python -m lasad_jax.train --workdir=runs/a "
        f"--distributed > logs/local/{i}.log"
        for i in (0, 1)
    ]
    said = tree("slurm.sh", "--nodes=2", *command, DRY_RUN="1")
    assert said.startswith("sbatch --nodes=2 launch/slurm.sbatch python -m lasad_jax.train")
    assert "xpk cluster create" in tree("gke.sh", "cluster", "c", *pod[1:3], DRY_RUN="1")
    for action in ("status", "logs", "stop"):
        assert "kubectl " in tree("gke.sh", action, "run", DRY_RUN="1")
    assert tree.calls() == []
    assert not (tree.root / "logs").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/pods.md"])
def test_launches_in_the_pages_are_taken(tree, page):
    text = (ROOT / page).read_text()
    shell = " \n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    shell = re.sub(r"\\\n", " ", shell)
    launches = re.findall(r"bash launch/((?:local|tpu_pod|gke|slurm)\.sh .*)", shell)
    assert len(launches) >= 2
    for launch in launches:
        assert tree(*shlex.split(launch, comments=True), DRY_RUN="1"), launch
    assert tree.calls() == []
