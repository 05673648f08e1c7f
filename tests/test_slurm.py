"""A job of a real Slurm: warned of its time limit, queued again, and done as if it never was."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from launching import Tree
from processes import run
from tiny import ROOT, command, environment, one_device_mesh, tiny_config

from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.state import abstract_state

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
MISSING = [
    name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]
STEPS = 60
FLAGS = (f"--config.steps={STEPS}", "--config.save_every=20", "--config.log_every=10")

# The trainer, at a second for each step: Slurm looks at time limits every half minute.
SLOW = """
import runpy, time
from lasad_jax.training.generator_task import GeneratorTask

def slowly(task, start, batches=GeneratorTask.train_batches):
    for batch in batches(task, start):
        time.sleep(1)
        yield batch

GeneratorTask.train_batches = slowly
runpy.run_module("lasad_jax.train", run_name="__main__")
"""

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# How long a job waits that was queued again.
AuthInfo=cred_expire=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SchedulerParameters=bf_interval=1
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """Slurm's daemons, for a node that is this machine."""
    if MISSING:
        pytest.skip(f"no Slurm here (Debian: slurm-wlm): {', '.join(MISSING)} missing")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    host = socket.gethostname().split(".")[0]
    config = CONFIG.format(host=host, user=getpass.getuser(), ports=ports, folder=folder)
    (folder / "slurm.conf").write_text(config)
    variables = environment(1) | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            with (folder / f"{name}.out").open("w") as out:
                call = [shutil.which(name, path=variables["PATH"]), "-D"]
                daemons.append(subprocess.Popen(call, env=variables, stdout=out, stderr=out))
        deadline = time.monotonic() + 20
        while (state := ask(variables, "sinfo", "--noheader", "--format=%T")) != "idle":
            if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > deadline:
                said = "".join(path.read_text() for path in folder.glob("*.log"))
                pytest.skip(f"Slurm does not run here; the node is {state!r}: {said[-500:]}")
            time.sleep(0.2)
        yield variables
    finally:
        for daemon in daemons[::-1]:
            daemon.terminate()
            daemon.wait(timeout=20)


def ask(variables, *call) -> str:
    return subprocess.run(
        call, env=variables, capture_output=True, text=True, check=False
    ).stdout.strip()


def final_state(workdir):
    state = abstract_state(tiny_config(steps=STEPS), one_device_mesh(tiny_config()))
    return Checkpoints(workdir, read_only=True).restore(STEPS, state)


def test_a_job_at_its_time_limit_is_queued_again_and_goes_on(slurm, tmp_path):
    tree = Tree(tmp_path)
    tree.environment |= slurm | {"ACCELERATOR": "none"}
    for name in ("lasad_jax", "tests", "configs"):
        (tree.root / name).symlink_to(ROOT / name)
    whole, warned = tmp_path / "whole", tmp_path / "warned"
    run(command(f"--workdir={whole}", *FLAGS))

    # Two minutes, of which the warning comes after a half to a whole one.
    flags = ("--time=2", "--signal=TERM@60", "--ntasks=1")
    trainer = ("python", "-c", SLOW, "--config=tests/tiny.py", f"--workdir={warned}", *FLAGS)
    said = tree("slurm.sh", *flags, "--", *trainer)
    job = re.search(r"Submitted batch job (\d+)", said)[1]
    states, deadline = [], time.monotonic() + 400
    try:
        while not states or states[-1] not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"):
            shown = ask(slurm, "scontrol", "--oneliner", "show", "job", job)
            state = re.search(r"JobState=(\w+)", shown)[1]
            if states[-1:] != [state]:
                states.append(state)
            assert time.monotonic() < deadline, states
            time.sleep(0.3)
    finally:
        ask(slurm, "scancel", job)
    logs = "".join(path.read_text() for path in sorted((tree.root / "logs").iterdir()))
    assert states[-1] == "COMPLETED", logs
    assert int(re.search(r"Restarts=(\d+)", shown)[1]) >= 1
    assert re.search(r"ended with (75|143); the job is RUNNING", logs)
    jax.tree.map(np.testing.assert_array_equal, final_state(warned), final_state(whole))
