"""Commands in processes of their own."""

import socket
import subprocess
import sys
from pathlib import Path

from tiny import ROOT, environment


def call(name: str, *flags) -> list[str]:
    """What a shell is given for python -m lasad_jax.NAME."""
    return [sys.executable, "-m", f"lasad_jax.{name}", *map(str, flags)]


def command(name: str, *flags, fails: bool = False) -> str:
    """What python -m lasad_jax.NAME says."""
    return run(call(name, *flags), fails=fails)


def run(arguments: list[str], *, fails: bool = False, cwd: Path = ROOT) -> str:
    """What a process says, which must be no traceback; it must fail or must not."""
    result = subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.returncode != 0) == fails, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


def run_two(arguments: list[str], *, devices: int = 1) -> list[tuple[str, str]]:
    """What two processes of a --distributed command say, on stdout and stderr; both succeed.

    Args:
      arguments: of both.
      devices: of each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    processes = [
        subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment(devices) | joined | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return said
