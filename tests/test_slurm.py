"""A job of a real Slurm: warned of its time limit, queued again, and done as if it never was."""

import getpass
import math
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
from tiny import ROOT, command, environment, one_device_mesh, tiny_config

from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.state import abstract_state

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
MISSING = [
    name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]
STEPS = 60
FLAGS = (f"--config.steps={STEPS}", "--config.save_every=20", "--config.log_every=10")

# The trainer, with a pause before each step: Slurm looks at time limits every half minute.
SLOW = """
import os, runpy, time
from lasad_jax.training.generator_task import GeneratorTask

def slowly(task, start, batches=GeneratorTask.train_batches):
    for batch in batches(task, start):
        time.sleep(float(os.environ["PAUSE"]))
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
# JAX makes its port of the job's number: another one in each of these Slurms.
FirstJobId={ports[0]}
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
    begun = time.monotonic()
    subprocess.run(command(f"--workdir={whole}", *FLAGS), cwd=ROOT, env=environment(1), check=True)

    # With a minute for saving the signal comes 60 to 90 seconds before the limit. The limit leaves
    # time to start, however slow this machine is, and the pauses alone last until the signal.
    minutes = math.ceil((1.5 * (time.monotonic() - begun) + 100) / 60)
    tree.environment["PAUSE"] = str(60 * (minutes - 1) / STEPS)
    flags = (f"--time={minutes}", "--signal=TERM@60", "--ntasks=1")
    trainer = ("python", "-c", SLOW, "--config=tests/tiny.py", f"--workdir={warned}", *FLAGS)
    said = tree("slurm.sh", *flags, "--", *trainer, "--distributed")
    job = re.search(r"Submitted batch job (\d+)", said)[1]
    state, deadline = "", time.monotonic() + 5 * 60 * minutes
    try:
        while state not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"):
            shown = ask(slurm, "scontrol", "--oneliner", "show", "job", job)
            if found := re.search(r"JobState=(\w+)", shown):
                state = found[1]
            if state == "PENDING":  # A job that was queued again would wait for two minutes.
                ask(slurm, "scontrol", "update", f"jobid={job}", "starttime=now")
            assert time.monotonic() < deadline, shown
            time.sleep(0.5)
    finally:
        ask(slurm, "scancel", job)
    logs = "".join(path.read_text() for path in sorted((tree.root / "logs").iterdir()))
    assert state == "COMPLETED", logs
    assert int(re.search(r"Restarts=(\d+)", shown)[1]) >= 1
    assert "ended with 75; the job is RUNNING" in logs
    jax.tree.map(np.testing.assert_array_equal, final_state(warned), final_state(whole))
