"""Work on threads ahead of whoever wants its results."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


def map_ahead(
    pool: Executor, function: Callable[..., Result], items: Iterable[tuple], depth: int
) -> Iterator[Result]:
    """function(*item) of each item in order, with at most `depth` begun or waiting.

    Unlike `Executor.map`, which begins with all items at once. An exception of `function`
    comes up at its item's turn; closing the iterator cancels what has not begun.
    """
    pending = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, *item))
            if len(pending) == depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
