"""Tables in Markdown, printed row by row, and the numbers in them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """One column.

    Attributes:
      name: its head.
      cell: from a row to what stands there; None where the row has nothing to say.
      width: least number of characters.
    """

    name: str
    cell: Callable[[dict], str | None]
    width: int = 9


def column(name: str, key: str, show: Callable[[Any], str] = str, width: int = 9) -> Column:
    """A column of the field `key`, shown by `show`."""
    return Column(name, lambda row: None if row.get(key) is None else show(row[key]), width)


def head(columns: Sequence[Column]) -> str:
    """The first two lines of a table."""
    return _line([c.name for c in columns], columns) + "\n" + "| --- " * len(columns) + "|"


def row_line(row: dict, columns: Sequence[Column]) -> str:
    """One row. What it lacks is a dash; the first gap holds the reason under "skipped"."""
    cells, missing = [], row.get("skipped", "-")
    for c in columns:
        cell = c.cell(row)
        if cell is None:
            cell, missing = missing, "-"
        cells.append(cell)
    return _line(cells, columns)


def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    widths = (max(len(c.name), c.width) for c in columns)
    return "| " + " | ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True)) + " |"


def digits(factor: float = 1.0, unit: str = "") -> Callable[[float], str]:
    """Shows a number times `factor` with three digits or more."""

    def show(value: float) -> str:
        value *= factor
        return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit

    return show


microseconds = digits(1e6)
milliseconds = digits(1e3)
gigabytes = digits(1e-9)
percent = digits(100, " %")
ratio = "{:.2f}".format


def one_line(error: BaseException) -> str:
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def check_known(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses names that are not among those known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is not one of {tuple(known)}")
