"""Ending early and well: a run that gets SIGTERM saves, wherever it is, and can be gone on with.

A thread hears of the signal at once, through the file descriptor that Python's C handler writes
to, whatever the main thread does: a Python handler would run only after a compilation or a
collective has ended. The loop says when the state is at rest: all the time but while it
dispatches a step. Then the thread saves and ends the process, in the middle of a compilation, an
evaluation, a drawing or a wait for data.

Several processes must save the same step. The first to hear of it tells the others (`Peers`: the
hosts' network alone, so that no step of a device waits for it); then each tells which step it
has begun, and none begins another until all have told. The latest of these steps is the last.
(`multihost_utils.reached_preemption_sync_point` agrees in the same way, but by JAX's own signal
handler and only at the next step, which a compilation or an evaluation holds up.)
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from lasad_jax.training.peers import Peers

# EX_TEMPFAIL of sysexits.h: the same command may succeed later.
EXIT_STATUS = 75

# A process that does not answer for so long will not do so within any grace time either.
_PATIENCE = 60  # seconds
_POLL = 0.5  # seconds between looks at whether another process has been told to end


class NeverPreempted:
    """For a run that nobody interrupts: what the loop says, and nobody hears."""

    @contextlib.contextmanager
    def at_rest(self, step: int, save: Callable[[], None]) -> Iterator[None]:
        """Says that inside the state is that of `step` and stays so; after it another begins.

        Args:
          step: of the state.
          save: puts it on disk, unless it is there. It is called in another thread.
        """
        del step, save
        yield


class Preemption(NeverPreempted):
    """SIGTERM for the duration of a `with` block, entered in the main thread.

    Until `at_rest` is first entered there is nothing to save.

    Args:
      peers: the processes of the run.
      end: ends this process with a status, at once.
    """

    def __init__(self, peers: Peers, end: Callable[[int], None] = os._exit):
        self._peers, self._end = peers, end
        self._changed = threading.Condition()
        self._begun = 0  # the newest step that the loop may have begun
        self._rest = (0, lambda: None)
        self._agreeing = self._closed = False
        self._last: int | None = None  # the step that all have agreed to be the last
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    def __enter__(self) -> "Preemption":
        self._heard, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._fd_before = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        # Without a handler nothing would be written. It replaces JAX's own, where processes are
        # joined.
        self._handler_before = signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._changed.wait_for(self._may_go_on)
            self._closed = True
            self._changed.notify_all()
        if self._last is None:
            # Whoever asks from now on may go to the end, as this process has.
            self._peers.tell("begun", str(sys.maxsize))
        signal.set_wakeup_fd(self._fd_before)
        signal.signal(signal.SIGTERM, self._handler_before or signal.SIG_DFL)
        os.close(self._written)
        self._thread.join()
        os.close(self._heard)

    @contextlib.contextmanager
    def at_rest(self, step: int, save: Callable[[], None]) -> Iterator[None]:
        """See `NeverPreempted`."""
        with self._changed:
            self._changed.wait_for(self._may_go_on)
            self._begun, self._rest = step, (step, save)
            self._changed.notify_all()
        yield
        with self._changed:
            self._changed.wait_for(self._may_go_on)
            self._begun, self._rest = step + 1, None

    def _may_go_on(self) -> bool:
        """False while processes agree, and for ever where the thread ends this one."""
        return not self._agreeing and not self._ends_here()

    def _ends_here(self) -> bool:
        return self._rest is not None and self._rest[0] == self._last

    def _watch(self) -> None:
        try:
            if not self._notice() or not self._agree():
                return
            step, save = self._rest
            save()
            print(
                f"\npreempted at step {step}: the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
            self._peers.leave(_PATIENCE)
            self._end(EXIT_STATUS)
        except BaseException as error:
            # The main thread may never come to hear of it.
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._end(1)

    def _notice(self) -> bool:
        """Waits for SIGTERM, here or at another process; false when the block has ended."""
        alone = self._peers.count == 1
        while True:
            if select.select([self._heard], [], [], None if alone else _POLL)[0]:
                signals = os.read(self._heard, 4096)
                if signal.SIGTERM in signals:
                    self._peers.tell("preempted", "")
                    return True
                if not signals:
                    return False
            elif self._peers.heard("preempted"):
                return True

    def _agree(self) -> bool:
        """Agrees on the last step and waits for it; false when the block has ended before."""
        with self._changed:
            if self._closed:
                return False
            self._agreeing = True
            begun = self._begun
        self._peers.tell("begun", str(begun))
        last = max(map(int, self._peers.hear_all("begun", _PATIENCE)))
        with self._changed:
            self._agreeing, self._last = False, last
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._ends_here())
            return not self._closed
