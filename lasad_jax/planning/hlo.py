"""A compiled program as XLA prints it: instructions, and how often each is run.

XLA's own analysis of costs counts the body of a loop once, however often it is run, and says
nothing of GPUs that are not at hand; so the text is read.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      dims: its sizes.
      bytes: without padding.
      on_chip: it lies in a memory beside the cores, not in the device's main memory.
    """

    dims: tuple[int, ...]
    bytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Attributes:
    name: unique in its computation.
    opcode: such as "dot".
    arrays: of the result, a tuple's laid out flat.
    operands: names.
    text: of everything after the operands.
    literal: what stands between the parentheses.
    root: its value is the computation's.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    literal: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of the whole result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        found = (match.group(1) for match in _CALLED.finditer(self.text))
        return [name for names in found for name in re.findall(r"[\w.-]+", names)]

    def number(self, name: str) -> int | None:
        """The value of an attribute."""
        found = re.search(rf"\b{name}=(\d+)", self.text)
        return int(found.group(1)) if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction in the course of the program.

    Attributes:
      instruction: itself.
      computation: where its operands are found.
      where: that computation's name.
      times: how often it is run.
      fused: it is part of another instruction, and writes to no memory.
    """

    instruction: Instruction
    computation: Computation
    where: str
    times: int
    fused: bool

    @property
    def operands(self) -> list[Instruction]:
        """What it reads, each once."""
        names = dict.fromkeys(self.instruction.operands)
        return [self.computation[name] for name in names if name in self.computation]


class Program:
    """A program, parsed.

    Attributes:
      computations: by name.
      entry: name of the first.
    """

    def __init__(self, text: str):
        """
        Args:
          text: of `jax.stages.Compiled.as_text()`.

        Raises:
          ValueError: if it is no HLO text.
        """
        self.computations: dict[str, Computation] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head.group(2), {})
                self.entry = head.group(2) if head.group(1) else self.entry
            elif current is not None and _NAME.match(line):
                instruction = _parse(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("hlo: the text has no ENTRY computation")

    def runs(self) -> Iterator[Run]:
        """Every instruction that is run; loops times their number of turns."""
        waiting = collections.deque([(self.entry, 1, False)])
        while waiting:
            name, times, fused = waiting.popleft()
            computation = self.computations[name]
            for instruction in computation.values():
                yield Run(instruction, computation, name, times, fused)
                turns = self.turns(instruction, computation) if instruction.opcode == "while" else 1
                # What a reduction applies to each pair of elements is no step of the program.
                inner = instruction.opcode in ("while", "call", "conditional", "async-start")
                if inner or instruction.opcode in ("fusion", "fusion-start"):
                    for called in instruction.called:
                        waiting.append((called, times * turns, fused or not inner))

    def turns(self, loop: Instruction, around: Computation) -> int:
        """How often a loop of `around` is run: as XLA knows, or by the constants between which its
        index goes and that are added to it; one where neither says.

        TPU's compiler works off a product with a gathered operand piece by piece, several pieces
        in each turn.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition, body = (
            self.computations[re.search(rf"\b{part}=%?([\w.-]+)", loop.text).group(1)]
            for part in ("condition", "body")
        )
        compared = root_of(condition)
        read = [condition[name] for name in compared.operands if name in condition]
        limits = [limit for x in read if (limit := _constant(x, condition)) is not None]
        places = [x.number("index") for x in read if x.opcode == "get-tuple-element"]
        if len(limits) != 1 or "direction=LT" not in compared.text:
            return 1
        start, step = 0, 1
        if places:
            first = _element(around[loop.operands[0]], places[0], around)
            start = _constant(first, around) if first else 0
            following = _element(root_of(body), places[0], body)
            if following and following.opcode == "add":
                added = [_constant(body[name], body) for name in following.operands]
                step = next((x for x in added if x), 1)
        return -(-(limits[0] - (start or 0)) // step)


def root_of(computation: Computation) -> Instruction:
    """The instruction whose value is the computation's."""
    return next(x for x in computation.values() if x.root)


def _element(x: Instruction, index: int, computation: Computation) -> Instruction | None:
    return computation.get(x.operands[index]) if x.opcode == "tuple" else None


def _constant(x: Instruction, computation: Computation) -> int | None:
    """The value of a whole number or of its copy; None of anything else."""
    while x.opcode == "copy" and x.operands[0] in computation:
        x = computation[x.operands[0]]
    known = x.opcode == "constant" and re.fullmatch(r"\d+", x.literal)
    return int(x.literal) if known else None


def _parse(line: str) -> Instruction:
    match = _NAME.match(line)
    rest = line[match.end() :]
    end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ") - 1
    shape, rest = rest[: end + 1], rest[end + 2 :]
    start = rest.index("(")
    end = _closing(rest, start)
    literal = rest[start + 1 : end]
    return Instruction(
        name=match.group(2),
        opcode=rest[:start],
        arrays=tuple(_arrays(shape)),
        operands=tuple(re.findall(r"%([\w.-]+)", literal)),
        text=rest[end + 1 :],
        literal=literal,
        root=bool(match.group(1)),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"hlo: no closing parenthesis in {text[:80]!r}")


def _arrays(shape: str) -> Iterator[Array]:
    for kind, sizes, layout in _ARRAY.findall(shape):
        dims = tuple(int(size) for size in sizes.split(",") if size)
        count = 1
        for size in dims:
            count *= size
        # A type is named by its bits: bf16, s32, f8e4m3fn.
        bits = _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind).group())
        yield Array(dims, -(-count * bits // 8), re.search(r"S\([1-9]\)", layout) is not None)
