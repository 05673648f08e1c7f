"""Plans for people: one in full, or many as rows of a table."""

from lasad_jax.benchmarks.tables import Column, column, digits, head, row_line

_GB = digits(1e-9)
_MS = digits(1e3)


def describe(row: dict) -> str:
    """A plan's row in full."""
    chip, step = row["chip"], row["step"]
    axes = [f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1]
    lines = [
        f"{row['parameters'] / 1e6:.0f}M parameters on {row['topology']}: {row['devices']} x "
        f"{chip['kind']}, mesh {', '.join(axes) or 1}",
        f"{row['batch']} images per device, {row['batch_size']} per step; {_how(row)}",
        "",
    ]
    usable = _GB(row["usable_memory"])
    if step is None:
        needed = f"{_GB(row['needed'])} GB needed, " if row["needed"] else ""
        lines.append(f"does not fit: {needed}{usable} GB usable")
    else:
        lines += [*_memory(row, usable), "", *_bounds(row), "", *_collectives(step)]
    return "\n".join([*lines, *_largest(row)])


def _how(row: dict) -> str:
    step = row["step"] or (row.get("largest") or {}).get("step")
    if step is None:
        return "refused by its compiler"
    return "compiled" if step["compiled"] else "by arithmetic (no compiler)"


def _memory(row: dict, usable: str) -> list[str]:
    kinds = {name: _GB(size) for name, size in row["step"]["memory"].items()}
    verdict = "fits" if row["fits"] else "does not fit"
    kinds["total"] = f"{_GB(row['step']['bytes'])} of {usable} usable: {verdict}"
    columns = (column("memory per device", "kind", width=17), column("GB", "size", width=30))
    return [head(columns), *(row_line({"kind": k, "size": v}, columns) for k, v in kinds.items())]


def _bounds(row: dict) -> list[str]:
    step, chip = row["step"], row["chip"]
    times = step["least_seconds"]
    sent = sum(x["sent"] for x in step["collectives"])
    traffic = "-" if step["traffic"] is None else f"{_GB(step['traffic'])} GB"
    amounts = (
        (f"{step['flops'] / 1e12:.3g} TFLOP", f"{chip['flops'] / 1e12:.0f} TFLOP/s"),
        (traffic, f"{chip['bandwidth'] / 1e9:.0f} GB/s"),
        (f"{_GB(sent)} GB", f"{chip['link'] / 1e9:.0f} GB/s"),
    )
    columns = (
        column("step, per device", "bound", width=16),
        column("amount", "amount", width=11),
        column("at best", "rate", width=12),
        column("at least ms", "seconds", _MS),
    )
    rows = [
        row_line({"bound": bound, "amount": a, "rate": rate, "seconds": seconds or None}, columns)
        for (bound, seconds), (a, rate) in zip(times.items(), amounts, strict=True)
    ]
    return [
        head(columns),
        *rows,
        f"bound by {step['bottleneck']}: at most {step['most_images_per_second']:.0f} images/s",
    ]


def _collectives(step: dict) -> list[str]:
    columns = (
        column("collective", "kind", width=18),
        column("devices", "group"),
        column("times", "times"),
        column("GB put in", "payload", _GB),
        column("GB sent", "sent", _GB),
    )
    found = [x for x in step["collectives"] if x["sent"] >= 1e6]
    return [head(columns), *(row_line(x, columns) for x in found), ""] if found else []


def _largest(row: dict) -> list[str]:
    if "largest" not in row:
        return []
    step, too_many = row["largest"]["step"], row["largest"]["too_many"]
    beyond = f"; {too_many} do not fit" if too_many else ""
    if step is None:
        return [f"no batch that was tried fits{beyond}"]
    return [
        f"largest batch that fits: {step['batch']} images per device ({_GB(step['bytes'])} GB, "
        f"bound by {step['bottleneck']}, at most {step['most_images_per_second']:.0f} images/s)"
        f"{beyond}"
    ]


def _mesh(row: dict) -> str | None:
    if "mesh" not in row:
        return None
    return " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)


def _at(name: str, show) -> Column:
    """A column of the planned step."""
    return Column(name, lambda row: show(row["step"]) if row.get("step") else None, 8)


def _most(row: dict) -> str | None:
    step = (row.get("largest") or {}).get("step")
    return step and f"{step['batch']} ({_GB(step['bytes'])} GB, {step['bottleneck']})"


LARGEST = Column("largest batch", _most, 30)
TABLE = (
    column("model", "size", width=5),
    column("machine", "topology", width=10),
    Column("mesh", _mesh, 17),
    column("batch", "batch", width=5),
    _at("GB", lambda step: _GB(step["bytes"])),
    _at("bound by", lambda step: step["bottleneck"]),
    _at("ms", lambda step: _MS(max(step["least_seconds"].values()))),
    LARGEST,
    _at("how", lambda step: "compiled" if step["compiled"] else "arithmetic"),
)
