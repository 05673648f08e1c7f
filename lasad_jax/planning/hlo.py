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
                turns = self.turns(instruction) if instruction.opcode == "while" else 1
                # What a reduction applies to each pair of elements is no step of the program.
                inner = instruction.opcode in ("while", "call", "conditional", "async-start")
                if inner or instruction.opcode in ("fusion", "fusion-start"):
                    for called in instruction.called:
                        waiting.append((called, times * turns, fused or not inner))

    def turns(self, loop: Instruction) -> int:
        """How often a loop is run: as XLA knows, or by the constant that its index is compared
        with; one where neither says."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.-]+)", loop.text).group(1)
        computation = self.computations[condition]
        root = next(x for x in computation.values() if x.root)
        literals = [computation[name].literal for name in root.operands if name in computation]
        numbers = [int(literal) for literal in literals if re.fullmatch(r"\d+", literal)]
        return numbers[0] if len(numbers) == 1 and "direction=LT" in root.text else 1


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
