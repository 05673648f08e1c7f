"""What a compiled program computes, and what it moves through a device's memory."""

import math
import re
from collections.abc import Iterator

from lasad_jax.planning.hlo import Array, Computation, Instruction, Program, Run, root_of

# Names for what is there already.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
    "async-done",
    "fusion-done",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "iota",
)
_FUSIONS = ("fusion", "fusion-start")
# Kernels of rows with a matrix (`passes.feed_forward`).
_PRODUCT_KERNELS = re.compile(r'op_name="[^"]*/swiglu_(?:forward|backward)/')
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")


def product_flops(program: Program) -> int:
    """FLOPs of the matrix products of a step on one device; within custom calls, only of those
    with weights."""
    return sum(run.times * _flops(run) for run in program.runs())


def memory_traffic(program: Program) -> int:
    """Bytes that a step reads and writes in a device's main memory.

    Every instruction that is not fused into another reads its operands and writes its result;
    where it takes a slice, only that. What stays in a cache is counted like the rest.
    """
    return sum(
        run.times * _traffic(run.instruction, run.computation, program)
        for run in program.runs()
        if not run.fused
    )


def custom_calls(program: Program) -> set[str]:
    """Targets of the custom calls."""
    targets = (
        re.search(r'custom_call_target="([^"]*)"', run.instruction.text)
        for run in program.runs()
        if run.instruction.opcode == "custom-call"
    )
    return {match.group(1) for match in targets if match}


def _flops(run: Run) -> int:
    x = run.instruction
    if x.opcode == "dot":
        lhs = run.computation[x.operands[0]].arrays[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.text).group(1)
        depth = math.prod(lhs[int(i)] for i in contracted.split(",") if i)
        return 2 * depth * math.prod(x.arrays[0].dims)
    if x.opcode == "convolution":
        return _convolution_flops(x, *(run.computation[name].arrays[0] for name in x.operands))
    if x.opcode == "custom-call" and _PRODUCT_KERNELS.search(x.text):
        rows, matrix = (run.computation[name].arrays[0].dims for name in x.operands[:2])
        return 2 * rows[0] * math.prod(matrix)
    return 0


def _convolution_flops(x: Instruction, lhs: Array, rhs: Array) -> int:
    """On TPUs every product is a convolution, often one whose window lies mostly in padding."""
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.text).groups()
    shape = dict(zip(output, x.arrays[0].dims, strict=True))
    products = shape.pop("b") * shape.pop("f") * rhs.dims[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", x.text)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    for i, size in shape.items():
        field = lambda name, default, i=i: (
            fields[name].split("x")[int(i)] if name in fields else default
        )
        low = field("pad", "0_0").split("_")[0]
        products *= _pairs(
            outputs=size,
            inputs=lhs.dims[inputs.index(i)],
            taps=rhs.dims[kernel.index(i)],
            stride=int(field("stride", "1")),
            low=int(low),
            spread=int(field("lhs_dilate", "1")),
            gap=int(field("rhs_dilate", "1")),
        )
    return 2 * products


def _pairs(
    *, outputs: int, inputs: int, taps: int, stride: int, low: int, spread: int, gap: int
) -> int:
    """Pairs of an output and a tap that meet an input, along one axis."""
    places = (out * stride + tap * gap - low for out in range(outputs) for tap in range(taps))
    return sum(0 <= at <= (inputs - 1) * spread and at % spread == 0 for at in places)


def _traffic(x: Instruction, computation: Computation, program: Program) -> int:
    name = x.opcode
    if name in _FREE or (name == "custom-call" and any(call in x.text for call in _FREE_CALLS)):
        return 0
    # The two ends of what goes on beside the rest: it is read at the first and written at the
    # second.
    read = 0 if name.endswith("-done") else _read(x, computation, program)
    written = (
        0 if name.endswith("-start") and name not in _FUSIONS else _written(x, computation, program)
    )
    return read + written


def _main(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)


def _read(x: Instruction, computation: Computation, program: Program) -> int:
    operands = [computation[name] for name in dict.fromkeys(x.operands) if name in computation]
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return min(x.bytes, _main(operands[0].arrays))
    if x.opcode == "slice-start":  # its operand, its result, a context
        return min(x.arrays[1].bytes, _main(operands[0].arrays))
    if x.opcode == "dynamic-update-slice":
        return _main(computation[x.operands[1]].arrays)
    if x.opcode not in _FUSIONS:
        return sum(_main(operand.arrays) for operand in operands)
    inner = program.computations[x.called[0]]
    parameters = [y for y in inner.values() if y.opcode == "parameter"]
    total = 0
    for parameter in parameters:
        outside = computation.get(x.operands[int(parameter.literal)])
        if outside is not None:
            whole = _main(outside.arrays)
            total += min(whole, _read_within(parameter, inner, program)) if whole else 0
    return total


def _read_within(source: Instruction, inner: Computation, program: Program) -> int:
    """Bytes of a fusion's parameter that its body reads: all, or what slices take of it."""
    total = 0
    for user in _users(source.name, inner):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == source.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue
        elif user.opcode == "bitcast":
            total += _read_within(user, inner, program)
        elif user.opcode == "fusion":
            body = program.computations[user.called[0]]
            total += sum(
                _read_within(y, body, program)
                for y in body.values()
                if y.opcode == "parameter" and user.operands[int(y.literal)] == source.name
            )
        else:
            return source.bytes
    return total


def _users(name: str, inner: Computation) -> Iterator[Instruction]:
    return (y for y in inner.values() if name in y.operands)


def _written(x: Instruction, computation: Computation, program: Program) -> int:
    if x.opcode == "dynamic-update-slice":
        return _main(computation[x.operands[1]].arrays)
    if x.opcode not in _FUSIONS:
        return _main(x.arrays)
    inner = program.computations[x.called[0]]
    root = root_of(inner)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    # One that goes on beside the rest lists its operands first.
    results = x.arrays[-1 - len(parts) : -1] if x.opcode == "fusion-start" else x.arrays
    if len(parts) != len(results):
        return _main(x.arrays)
    return sum(
        min(array.bytes, _written_within(part, inner, program))
        for array, part in zip(results, parts, strict=True)
        if not array.on_chip
    )


def _written_within(part: Instruction, inner: Computation, program: Program) -> int:
    """Bytes of a fusion's result that are new: where a slice is put in place, only that."""
    while part.opcode == "bitcast" and part.operands[0] in inner:
        part = inner[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return inner[part.operands[1]].bytes
    if part.opcode == "fusion" and len(part.arrays) == 1:
        body = program.computations[part.called[0]]
        return _written_within(root_of(body), body, program)
    return part.bytes
