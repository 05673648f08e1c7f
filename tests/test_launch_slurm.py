"""Slurm: what is submitted and when it is queued again, against false programs."""

import re

import pytest
from launching import FalseTree


@pytest.fixture
def tree(tmp_path):
    return FalseTree(tmp_path)


def test_slurm_submits_with_the_users_flags(tree):
    train = ["python", "-m", "lasad_jax.train", "--workdir=a b"]
    tree("slurm.sh", "--nodes=2", "--time=60", "--", *train)
    tree("slurm.sh", "--", "hostname")
    assert tree.calls() == [
        ["sbatch", "--nodes=2", "--time=60", "launch/slurm.sbatch", *train, "--distributed"],
        ["sbatch", "launch/slurm.sbatch", "hostname"],
    ]
    assert (tree.root / "logs").is_dir()


@pytest.mark.parametrize(
    ("ended", "job", "requeued"),
    [
        (0, "RUNNING", False),
        (75, "RUNNING", True),
        (143, "RUNNING", True),
        (75, "CANCELLED", False),
        (1, "RUNNING", False),
    ],
)
def test_a_job_is_queued_again_when_it_was_warned(tree, ended, job, requeued):
    (tree.fakes / "srun").write_text(str(ended))
    (tree.fakes / "job").write_text(job)
    job = {"SLURM_SUBMIT_DIR": str(tree.root), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}
    tree("slurm.sbatch", "train", "a b", status=ended, **job)
    srun, *rest = tree.calls()
    assert srun[0] == "srun"
    assert "--cpus-per-task=3" in srun
    assert srun[-2:] == ["train", "a b"]
    assert (rest[-1:] == [["scontrol", "requeue", "7"]]) == requeued
    header = re.findall(r"^#SBATCH (\S+)", (tree.root / "launch/slurm.sbatch").read_text(), re.M)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(header)
