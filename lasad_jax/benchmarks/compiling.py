"""Compiles many programs side by side, before any of them is timed."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from tqdm import tqdm

Options = Mapping[str, Any]


class Compilation:
    """Programs on their way, each in a thread of its own, the first ones first."""

    def __init__(
        self,
        programs: Mapping[Hashable, Callable[[], jax.stages.Lowered]],
        options: Mapping[Hashable, Options] | None = None,
    ):
        """Traces programs one after another, under a progress bar, and goes on to compile them.

        Args:
          programs: what traces each.
          options: XLA's flags for some of them, by the same names, as
            {"xla_gpu_enable_latency_hiding_scheduler": True}.
        """
        self._futures = {}
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        for name, lower in tqdm(programs.items(), "tracing", disable=None):
            try:
                compile_it = lower().compile
                future = pool.submit(compile_it, (options or {}).get(name))
            except Exception as error:
                future = concurrent.futures.Future()
                future.set_exception(error)
            self._futures[name] = future
        pool.shutdown(wait=False)

    @property
    def unfinished(self) -> int:
        """How many are not there yet."""
        return sum(not future.done() for future in self._futures.values())

    def done(self, name: Hashable) -> bool:
        """Whether a program is there, or has failed."""
        return self._futures[name].done()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when all are there, or after so many seconds."""
        done = concurrent.futures.as_completed(self._futures.values(), seconds)
        bar = tqdm(done, "compiling", total=len(self._futures), disable=None)
        try:
            for _ in bar:
                pass
        except TimeoutError:
            bar.close()

    def result(self, name: Hashable) -> jax.stages.Compiled | Exception:
        """A program, waited for, or in its place the reason why it failed."""
        future = self._futures[name]
        return future.exception() or future.result()


def compile_all(
    programs: Mapping[Hashable, Callable[[], jax.stages.Lowered]],
) -> dict[Hashable, jax.stages.Compiled | Exception]:
    """Traces programs one after another and compiles them in threads, under a progress bar.

    Args:
      programs: what traces each.

    Returns:
      the compiled programs under the same names; in the place of one that fails, the reason.
    """
    compilation = Compilation(programs)
    compilation.wait()
    return {name: compilation.result(name) for name in programs}


def compiled(program: jax.stages.Compiled | Exception) -> jax.stages.Compiled:
    """The program; raises the reason if there is none."""
    if isinstance(program, Exception):
        raise program
    return program
