"""Compiles many programs side by side, before any of them is timed."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Mapping

import jax
from tqdm import tqdm


def compile_all(
    programs: Mapping[Hashable, Callable[[], jax.stages.Lowered]],
) -> dict[Hashable, jax.stages.Compiled | Exception]:
    """Traces programs one after another and compiles them in threads, under a progress bar.

    Args:
      programs: what traces each.

    Returns:
      the compiled programs under the same names; in the place of one that fails, the reason.
    """
    results, waiting = {}, {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, lower in tqdm(programs.items(), "tracing", disable=None):
            try:
                waiting[pool.submit(lower().compile)] = name
            except Exception as error:
                results[name] = error
        done = concurrent.futures.as_completed(waiting)
        for future in tqdm(done, "compiling", total=len(waiting), disable=None):
            results[waiting[future]] = future.exception() or future.result()
    return results


def compiled(program: jax.stages.Compiled | Exception) -> jax.stages.Compiled:
    """The program; raises the reason if there is none."""
    if isinstance(program, Exception):
        raise program
    return program
