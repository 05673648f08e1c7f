"""What a compiled program sends between devices."""

import collections
import dataclasses
import math
import re

from lasad_jax.planning.hlo import Program, Run

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind among groups of one size.

    Attributes:
      kind: of `KINDS`.
      group: devices that take part in one.
      times: run in a step.
      payload: bytes that a device puts in, over the step.
      sent: bytes that a device sends, over the step, on a ring of the group.
    """

    kind: str
    group: int
    times: int
    payload: float
    sent: float


def count_collectives(program: Program) -> list[Collective]:
    """The collectives of a step, largest first."""
    totals = collections.defaultdict(lambda: [0, 0])
    seen = set()
    for run in program.runs():
        kind = run.instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # TPUs run one collective beside several fusions and print it in each of them.
        channel = run.instruction.number("channel_id")
        if run.fused and channel is not None:
            if channel in seen:
                continue
            seen.add(channel)
        if run.where.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        group = 2 if kind == "collective-permute" else _group_size(run.instruction.text)
        if group == 1:
            continue
        total = totals[kind, group]
        total[0] += run.times
        total[1] += run.times * _payload(run)
    found = [collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda x: -x.sent)


def collective(kind: str, group: int, times: int, payload: float) -> Collective:
    """With what each device sends on a ring of the group."""
    if kind == "all-gather":
        share = group - 1
    elif kind == "all-reduce":
        share = 2 * (group - 1) / group
    else:
        share = 1 if kind == "collective-permute" else (group - 1) / group
    return Collective(kind, group, times, payload, payload * share)


def _payload(run: Run) -> int:
    return sum(operand.bytes for operand in run.operands)


def _group_size(text: str) -> int:
    """Devices of the first group, in any of XLA's ways to write them."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return match.group(1).count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match.group(1))
    # mesh['a'=4,'b'=2], device_ids=(...) {'a','b':(1)2}: some axes, or parts of an axis.
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? ?\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    raise ValueError(f"hlo: no replica groups in {text[:200]!r}")
