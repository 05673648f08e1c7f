"""The CSV file that says which class, and if wanted which split, an image file belongs to."""

import csv
import os
import re
from pathlib import Path

from lasad_jax.data.sources.listing import HELD_OUT, Listing


def read_label_file(path: Path, directory: Path) -> Listing:
    """Reads columns path and label, and split if there is one; the order is the file's.

    Labels are all whole numbers, 0 to K - 1 for the K different ones of the file, without
    gaps: a mistyped number would be taken for a class otherwise. Or they are all names,
    which become classes in sorted order.

    Args:
      path: of the CSV file, UTF-8 with a header.
      directory: that the paths in it are relative to.

    Returns:
      The files. The splits test, validation and val are all "test", but where the file has
      several of these only the first in that order counts, and the others are unused.

    Raises:
      FileNotFoundError: no such file, or a listed image that does not exist.
      ValueError: no CSV file, a missing column or value, a path listed twice, labels that do
        not fit together, another split, or a split without images.
    """
    rows = _read_rows(path)
    where = f"data.labels: {path}"
    lines: dict[str, int] = {}
    for line, row in rows:
        name = os.path.normpath(row["path"])
        if name in lines:
            raise ValueError(
                f"{where}, line {line}: path {row['path']!r} is on line {lines[name]} already; "
                "keep one of them"
            )
        lines[name] = line
    if missing := [name for name in lines if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{where}, line {lines[missing[0]]}: path {missing[0]!r} is not in data.directory, "
            f"{str(directory)!r}; in all {len(missing)} of {len(lines)} paths are missing"
        )
    class_names, labels = _classes(where, [(line, row["label"]) for line, row in rows])
    splits = None
    if "split" in rows[0][1]:
        splits = _splits(where, [(line, row["split"].lower()) for line, row in rows])
    return Listing(tuple(lines), labels, class_names, splits)


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, values by column), every value filled in."""
    where = f"data.labels: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{where} is no file; give a CSV file with columns path, label")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where} is not CSV in UTF-8 ({error})") from error
    if absent := [name for name in ("path", "label") if name not in header]:
        raise ValueError(
            f"{where} has the columns {', '.join(header)} but no column {' and no '.join(absent)}; "
            "its first line must name path and label"
        )
    if not rows:
        raise ValueError(f"{where} lists no images")
    for line, values in rows:
        if len(values) != len(header):
            raise ValueError(
                f"{where}, line {line}: {len(values)} values for {len(header)} columns; "
                "put a value with commas in double quotes"
            )
        for name, value in zip(header, values, strict=True):
            if name in ("path", "label", "split") and not value:
                raise ValueError(f"{where}, line {line}: {name} is empty")
    return [(line, dict(zip(header, values, strict=True))) for line, values in rows]


def _classes(where: str, labels: list[tuple[int, str]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    is_number = [bool(re.fullmatch("[+-]?[0-9]+", label)) for _, label in labels]
    if not all(is_number):
        if any(is_number):
            line, label = labels[is_number.index(not is_number[0])]
            raise ValueError(
                f"{where}, line {line}: label {label!r} is {'no' if is_number[0] else 'a'} "
                f"whole number, unlike {labels[0][1]!r} before it; use numbers or names throughout"
            )
        class_names = tuple(sorted({label for _, label in labels}))
        index = {name: i for i, name in enumerate(class_names)}
        return class_names, tuple(index[label] for _, label in labels)
    numbers = [int(label) for _, label in labels]
    count = len(set(numbers))
    for (line, label), number in zip(labels, numbers, strict=True):
        if not 0 <= number < count:
            raise ValueError(
                f"{where}, line {line}: label {label} is outside 0 to {count - 1}, the range of "
                f"{count} different labels; number the classes from 0 without gaps, or name them"
            )
    return tuple(str(i) for i in range(count)), tuple(numbers)


def _splits(where: str, splits: list[tuple[int, str]]) -> tuple[str, ...]:
    for line, split in splits:
        if split not in ("train", *HELD_OUT):
            raise ValueError(
                f"{where}, line {line}: split {split!r} is not one of train, {', '.join(HELD_OUT)}"
            )
    present = {split for _, split in splits}
    held_out = next((name for name in HELD_OUT if name in present), None)
    if held_out is None or "train" not in present:
        lacking = "train" if held_out else "test"
        raise ValueError(
            f"{where} has a column split but no line with {lacking}; leave the column out to "
            "hold out one image in 20"
        )
    names = {"train": "train", held_out: "test"}
    return tuple(names.get(split, "") for _, split in splits)
