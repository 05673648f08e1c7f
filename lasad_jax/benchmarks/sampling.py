"""Times drawing images with whole generators, LASAD against softmax attention.

    python -m lasad_jax.benchmarks.sampling [--out=FOLDER] [--cases=B:128x16x16,B:1x16x16]

Prints one table: for every case (size, batch, grid) and mixer the time of drawing a batch with
guidance in bf16, against the bytes that each token has to read at the speed of a plain copy,
measured first, and against what LlamaGen takes where that was measured. A second table follows
the time of a token along the sequence, a third the memory over its length. docs/speed.md says
how to read them.

    --kernels         also: where the time of a token goes, by kernel (on a GPU)
    --agreement=2048  also: so many codes drawn after each image, by the plain path and fast
    --decoder=mosaic  by another form of the decoder, for LASAD alone (--mixers=lasad)
"""

import functools
import itertools

from absl import flags

from lasad_jax import command
from lasad_jax.benchmarks import (
    agreement,
    decoding,
    generators,
    kernel_rows,
    llamagen,
    plots,
    results,
    sample_rows,
)
from lasad_jax.benchmarks.compiling import compile_all, compiled
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.tables import (
    Column,
    column,
    digits,
    gigabytes,
    head,
    microseconds,
    ratio,
    row_line,
)

_ALONG = flags.DEFINE_string(
    "along", None, "Case whose tokens are timed one after another; by device if unset, '' for none."
)
_AGREEMENT = flags.DEFINE_integer(
    "agreement", 0, "Codes to draw after each image of the first case, by both paths.", 0
)
for module in (results, generators, decoding, kernel_rows):
    flags.adopt_module_key_flags(module)

# First whole batches, then the latency of one image.
_ON_ACCELERATOR = {
    "cases": [
        *("B:128x16x16", "XL:64x16x16", "L:64x32x32"),
        *("B:1x16x16", "B:1x32x32", "XL:1x16x16", "XL:1x32x32"),
    ],
    "along": "B:32x64x64",
}
_ON_CPU = {"cases": ["tiny:2x4x4", "tiny:1x4x4"], "along": "tiny:1x8x8"}
_SEGMENTS, _LENGTHS, _SHOWN = 64, 4, 8

COLUMNS = (
    column("case", "case", width=12),
    column("tokens", "tokens"),
    column("mixer", "mixer"),
    column("s", "seconds", digits()),
    column("images/s", "images_per_second", digits()),
    column("us/token", "seconds_per_token", microseconds),
    column("floor", "floor_seconds", microseconds),
    column("/ floor", "over_floor", ratio),
    column("GB", "memory_bytes", gigabytes),
    column("GB allocated", "allocator_bytes", gigabytes),
    column("/ softmax", "over_softmax", ratio),
    column("LlamaGen", "llamagen", lambda peer: digits()(peer["images_per_second"])),
    column("/ LlamaGen", "over_llamagen", ratio),
    column("its GB", "llamagen", lambda peer: gigabytes(peer["memory_bytes"])),
)
AGREEMENT_COLUMNS = (
    column("case", "case", width=12),
    column("mixer", "mixer"),
    column("draws", "draws"),
    column("plain, two seeds", "plain", digits()),
    column("fast, two seeds", "fast", digits()),
    column("fast to plain", "between", digits()),
    column("plain to float32", "plain_error", digits()),
    column("fast to float32", "fast_error", digits()),
)
MEMORY_COLUMNS = (
    column("case", "case", width=12),
    column("tokens", "tokens"),
    column("mixer", "mixer"),
    column("GB", "memory_bytes", gigabytes),
)


def _along_columns(positions: list[int]) -> tuple[Column, ...]:
    def cell(position: int, row: dict) -> str | None:
        if "skipped" in row:
            return None
        return microseconds(row["seconds_per_token"][row["positions"].index(position)])

    times = (Column(f"at {p}", functools.partial(cell, p)) for p in positions)
    return column("mixer", "mixer"), *times


def main() -> None:
    """Prints the tables and writes the files."""
    sizes = _ON_CPU if results.on_cpu() else _ON_ACCELERATOR
    texts = sizes["cases"] if generators.CASES.value is None else generators.CASES.value
    cases = [GeneratorCase.parse(text) for text in texts]
    along = sizes["along"] if _ALONG.value is None else _ALONG.value
    along = GeneratorCase.parse(along, "along") if along else None
    mixers = generators.mixers()
    if not cases and _AGREEMENT.value:
        raise ValueError("cases: none given; --agreement takes the first one")

    found = results.Results("sampling", repeats=3, min_seconds=0.5)
    found |= {"guidance": decoding.GUIDANCE, "llamagen": llamagen.SOURCE}
    print(f"{found.header()}\nguidance {decoding.GUIDANCE}; LlamaGen: {llamagen.SOURCE}")

    shown = [*cases, *(_shrunk(along) if along else ())]
    programs = {
        (case, mixer): functools.partial(sample_rows.lower_drawing, case, mixer)
        for case, mixer in itertools.product(dict.fromkeys(shown), mixers)
    }
    for mixer in mixers if along else ():
        segment = functools.partial(sample_rows.lower_along, along, mixer, _segment(along))
        programs["along", mixer] = segment
    programs = compile_all(programs)
    print("\n" + head(COLUMNS))
    for case in cases:
        baseline = {}
        for mixer in mixers:
            row = sample_rows.time_row(
                case,
                mixer,
                programs[case, mixer],
                bytes_per_second=found.bytes_per_second,
                how=found.how,
            )
            if mixer == "softmax":
                baseline = row
            else:
                row |= generators.over_softmax(row, baseline)
            found.add("rows", row)
            print(row_line(row, COLUMNS), flush=True)
    for case, mixer in itertools.product(cases, mixers) if kernel_rows.KERNELS.value else ():
        results.or_skip("kernels", _kernels, found, case, mixer, programs[case, mixer])
    if along:
        _print_along(found, along, mixers, programs)
    if _AGREEMENT.value:
        print("\ntotal variation of the last code\n" + head(AGREEMENT_COLUMNS))
    for mixer in mixers if _AGREEMENT.value else ():
        row = agreement.agreement_row(cases[0], mixer, _AGREEMENT.value)
        found.add("agreement", row)
        print(row_line(row, AGREEMENT_COLUMNS), flush=True)


def _kernels(found: results.Results, case: GeneratorCase, mixer: str, draw) -> None:
    """Prints what each kernel takes of a token, whatever is done once for an image in it."""
    draw, inputs = compiled(draw), sample_rows.drawing_inputs(case, mixer)
    row = {"case": str(case), "mixer": mixer}
    kernel_rows.print_kernels(found, row, draw, [inputs], parts=case.tokens)


def _segment(case: GeneratorCase) -> int:
    """Tokens that are timed together."""
    return max(1, case.tokens // _SEGMENTS)


def _shrunk(case: GeneratorCase) -> list[GeneratorCase]:
    """The same on grids of growing sides."""
    return [case.shrunk(part, _LENGTHS) for part in range(1, _LENGTHS + 1)]


def _print_along(
    found: results.Results, case: GeneratorCase, mixers: list[str], programs: dict
) -> None:
    """Time along the sequence and memory over its length, printed and drawn."""
    length = _segment(case)
    positions = [length * i for i in range(case.tokens // length)]
    # A handful of places and the last; the file has all.
    shown = [*positions[:: -(-len(positions) // _SHOWN)], positions[-1]]
    columns = _along_columns(list(dict.fromkeys(shown)))
    print(f"\nmicroseconds per token of {case}, along the sequence\n" + head(columns))
    for mixer in mixers:
        row = sample_rows.along_row(
            case, mixer, programs["along", mixer], length=length, repeats=found.how["repeats"]
        )
        found.add("along", row)
        print(row_line(row, columns), flush=True)

    print("\nmemory of drawing images of growing sides\n" + head(MEMORY_COLUMNS))
    for mixer, shrunk in itertools.product(mixers, _shrunk(case)):
        row = sample_rows.memory_row(shrunk, mixer, programs[shrunk, mixer])
        found.add("memory", row)
        print(row_line(row, MEMORY_COLUMNS), flush=True)
    with found.picture() as file:
        if file:
            plots.draw_along(found["along"], found["memory"], found["device"], file)


if __name__ == "__main__":
    command.run(main)
