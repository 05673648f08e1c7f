"""Several processes of one machine, which are real."""

import shlex
import signal
import time

import pytest
from launching import FalseTree

MEET = """
import jax, sys
jax.distributed.initialize(num_processes=2, process_id=int(sys.argv[1]))
print("process", jax.process_index(), "of", jax.process_count(), "devices", jax.device_count())
"""


@pytest.fixture
def tree(tmp_path):
    return FalseTree(tmp_path)


def test_local_processes_meet(tree):
    number = '"$JAX_PROCESS_ID"'
    command = f"exec python -c {shlex.quote(MEET)} {number}"
    tree("local.sh", "--processes=2", "--devices=2", "--", "bash", "-c", command, XLA_FLAGS="")
    for process in (0, 1):
        log = (tree.root / f"logs/local/{process}.log").read_text()
        assert f"process {process} of 2 devices 4\n" in log


def test_local_processes_end_together(tree):
    waits = "trap 'echo stopped; exit 75' TERM; echo here; while true; do sleep 0.02; done"
    log = tree.root / "logs/local"
    fails = (
        f"if [[ $JAX_PROCESS_ID == 1 ]]; then until grep here {log}/0.log; do :; done; exit 9; fi"
    )
    tree("local.sh", "--processes=3", "--", "bash", "-c", f"{fails}; {waits}", status=9)
    assert "stopped" in (log / "0.log").read_text()

    process = tree.start("local.sh", "--processes=2", "--gpus", "--", "bash", "-c", waits)
    try:
        deadline = time.monotonic() + 20
        while (
            not all("here" in (log / f"{i}.log").read_text() for i in (0, 1))
            or "stopped" in (log / "0.log").read_text()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 75
