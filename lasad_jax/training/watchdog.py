"""Says which process is behind when a run makes no progress.

Every process tells the step that its loop has begun and what it is doing; the first looks at all.
One that hangs is at an older step than those that wait for it, or has not been heard from.
"""

import itertools
import threading
import time
from collections.abc import Callable

from absl import logging

from lasad_jax.training.peers import Peers


class Watchdog:
    """A thread of its own for the duration of a `with` block.

    Args:
      peers: the processes of the run.
      where: the step that this process has begun, and what it is doing, in a word.
      seconds: without progress of the slowest process after which a line says where all are;
        again after twice as long, and so on. 0 for never.
      say: takes the line.
    """

    def __init__(
        self,
        peers: Peers,
        where: Callable[[], tuple[int, str]],
        seconds: float,
        say: Callable[[str], None] = logging.warning,
    ):
        self._peers, self._where, self._seconds, self._say = peers, where, seconds, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def _run(self) -> None:
        interval = min(10.0, self._seconds / 5)
        slowest, since, patience = -1, time.monotonic(), self._seconds
        heard: dict[int, tuple[str, float]] = {}  # the newest word of each process, and when
        for beat in itertools.count():
            step, doing = self._where()
            try:
                # The count makes each word another, so that a silent process is known by it.
                self._peers.tell("beat", f"{step} {doing} {beat}")
                if self._peers.index == 0:
                    now = time.monotonic()
                    for index, word in self._peers.heard("beat").items():
                        if heard.get(index, ("", 0.0))[0] != word:
                            heard[index] = word, now
                    behind = min(int(word.split()[0]) for word, _ in heard.values())
                    if behind != slowest:
                        slowest, since, patience = behind, now, self._seconds
                    elif now - since >= patience:
                        patience *= 2
                        words = report(heard, now, self._peers.count, 3 * interval)
                        self._say(f"no progress for {now - since:.0f} s: {words}")
            except RuntimeError as error:
                # The first process is gone, and with it the store; JAX itself ends the run.
                self._say(f"no word from the first process: {error}")
                return
            if self._over.wait(interval):
                return


def report(heard: dict[int, tuple[str, float]], now: float, count: int, silence: float) -> str:
    """Processes by where they are, those behind first.

    Args:
      heard: the newest word "STEP DOING ..." of each process, and the time it came.
      now: the time.
      count: of processes.
      silence: seconds after which a process counts as silent.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for index in range(count):
        if index not in heard:
            place = (-1, "has not begun")
        else:
            (step, doing), came = heard[index][0].split()[:2], heard[index][1]
            silent = f", silent for {now - came:.0f} s" if now - came > silence else ""
            place = (int(step), f"is at step {step}, {doing}{silent}")
        groups.setdefault(place, []).append(index)
    return "; ".join(
        f"process {', '.join(map(str, members))} {words}"
        for (_, words), members in sorted(groups.items())
    )
