"""Commands in processes of their own."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing.reduction import DupFd
from pathlib import Path

from tiny import ROOT, environment

_FORKS = multiprocessing.get_context("forkserver")
# All that takes long to import, but no module that defines a command's own flags.
_FORKS.set_forkserver_preload(
    [
        "lasad_jax.command",
        "lasad_jax.training.loop",
        "lasad_jax.sampling.run",
        "lasad_jax.evaluation.requests",
        "lasad_jax.interop.verification",
    ]
)


def call(name: str, *flags) -> list[str]:
    """What a shell is given for python -m lasad_jax.NAME."""
    return [sys.executable, "-m", f"lasad_jax.{name}", *map(str, flags)]


def start(name: str, *flags, devices: int = 1, said=None):
    """python -m lasad_jax.NAME at work, forked from a process that has imported the libraries.

    Args:
      name: of the command.
      flags: of it.
      devices: of the process.
      said: a file that takes what it says; nothing is kept if None.
    """
    with open(os.devnull, "w") as nowhere:
        output = DupFd((said or nowhere).fileno())
        arguments = [f"lasad_jax.{name}", *map(str, flags)]
        process = _FORKS.Process(target=_run, args=(arguments, environment(devices), output))
        process.start()
    return process


def command(name: str, *flags, devices: int = 1, fails: bool = False) -> str:
    """What python -m lasad_jax.NAME says, which must be no traceback; it must fail or must not."""
    with tempfile.TemporaryFile("w+") as said:
        process = start(name, *flags, devices=devices, said=said)
        process.join(timeout=300)
        process.kill()
        process.join()
        said.seek(0)
        text = said.read()
    assert (process.exitcode != 0) == fails, text
    assert process.exitcode in (0, 1), (process.exitcode, text)
    assert "Traceback" not in text, text
    return text


def _run(arguments: list[str], environ: dict[str, str], output: DupFd) -> None:
    """Within the process: the command, as Python's -m runs it."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    handle = output.detach()
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def run(arguments: list[str], *, cwd: Path = ROOT) -> str:
    """What a program says, which must end well."""
    result = subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
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
