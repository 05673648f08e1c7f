"""Training commands in processes that start at once: forked after the imports, before any device.

As a script it is the server: it takes requests as lines of JSON on its input and answers each
with one on its output.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

STALLS = {
    "compile": ("lasad_jax.training.generator_task", "GeneratorTask", "compile", 60.0),
    "evaluate": ("lasad_jax.training.generator_task", "GeneratorTask", "evaluate", 60.0),
    "picture": ("lasad_jax.training.generator_task", "GeneratorTask", "picture", 60.0),
    "save": ("lasad_jax.training.checkpoints", "Checkpoints", "save", 0.5),
}


class Run:
    """A training command on its way."""

    def __init__(self, commands: "Commands", pid: int, log: Path):
        self._commands, self.pid, self._log = commands, pid, log

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status; minus the signal that killed it."""
        return self._commands.ask({"wait": self.pid})

    def ended(self) -> bool:
        return self._commands.ask({"ended": self.pid})

    def said(self) -> str:
        return self._log.read_text()


class Commands:
    """Starts training commands; a `with` block."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self._environment, self._folder, self._count = environment, folder, 0

    def __enter__(self) -> "Commands":
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=Path(__file__).parents[1],
            env=self._environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(60)

    def ask(self, request: dict):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *flags: str, stall: tuple[str, int] = ("", 0), joined: dict | None = None):
        """Starts python -m lasad_jax.train.

        Args:
          flags: of the command.
          stall: one of `STALLS`, and the calls of it that go well before one takes long.
          joined: environment that tells which of several processes it is.
        """
        self._count += 1
        log = self._folder / f"log_{self._count}"
        log.touch()
        request = {"flags": flags, "stall": stall, "joined": joined or {}, "log": str(log)}
        return Run(self, self.ask(request), log)


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _serve() -> None:
    import tensorboardX  # noqa: F401, what a command would import first of all

    from lasad_jax.training import flags  # noqa: F401

    statuses = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "flags" in request:
            pid = os.fork()
            if pid == 0:
                _train(request)
            answer = pid
        else:
            pid = request.get("wait") or request["ended"]
            if pid not in statuses:
                found, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(pid) if "wait" in request else pid in statuses
        print(json.dumps(answer), flush=True)


def _train(request: dict) -> None:
    """In the child: the command, to its end."""
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        import jax

        from lasad_jax.config import Config
        from lasad_jax.training.flags import run_training

        os.environ |= request["joined"]
        if request["joined"]:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _stall(*request["stall"])
        sys.argv = ["train", "--config=tests/tiny.py", *request["flags"]]
        run_training(Config)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stall(name: str, calls: int) -> None:
    """Lets a method take long, and says "stalled" meanwhile."""
    if not name:
        return
    module, cls, method, seconds = STALLS[name]
    cls = getattr(sys.modules[module], cls)
    whole, left = getattr(cls, method), [calls]

    def stalling(*args):
        left[0] -= 1
        if left[0] < 0:
            print("stalled", flush=True)
            time.sleep(seconds)
        return whole(*args)

    setattr(cls, method, stalling)


if __name__ == "__main__":
    _serve()
