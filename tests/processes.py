"""Commands in processes of their own."""

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
