"""Times training and drawing on several devices of one host against one of them.

    python -m lasad_jax.benchmarks.scaling --out=FOLDER [--devices=1,2,4] [--minutes=8]

Training steps of B, XL and XXL at a constant batch for each device, on meshes that copy the model
or split it; the losses of the same batches on one device and on all; 4,096 images drawn, and
whether the codes are those of one device. Everything is compiled first, side by side; rows come
in the order of their importance, as they can be had. docs/scaling.md says how to read them.

    --xla=NAME:FLAG=VALUE,FLAG=VALUE  also: data and fsdp on all devices with these flags of XLA
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator

import jax
from absl import flags

import lasad_jax
from lasad_jax import command
from lasad_jax.benchmarks import draw_rows, limits, mesh_rows, meshes, results
from lasad_jax.benchmarks.compiling import Compilation
from lasad_jax.benchmarks.draw_rows import Drawing
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.mesh_rows import with_efficiency
from lasad_jax.benchmarks.meshes import Run
from lasad_jax.benchmarks.scaling_rows import Rows

_PAUSE = 0.1  # seconds between looks at the compiler

_RUNS = flags.DEFINE_list(
    "runs",
    None,
    f"SIZE:BxRxC/MESH each, B images on a device, a mesh of {', '.join(meshes.MESHES)}",
)
_DEVICES = flags.DEFINE_list("devices", None, "Their numbers, rising; powers of two if unset.")
_DRAW = flags.DEFINE_string(
    "draw", None, "SIZE:BxRxC to draw, B images at a time on a device; '' for none."
)
_IMAGES = flags.DEFINE_integer("images", None, "To draw; by device if unset.", 1)
_FLOAT32 = flags.DEFINE_bool("float32", True, "Compare codes drawn in float32 too.")
_LOSS_STEPS = flags.DEFINE_integer(
    "loss_steps", 50, "Steps of the first run to compare losses over; 0 for none.", 0
)
_XLA = flags.DEFINE_multi_string("xla", [], "NAME:FLAG=VALUE,FLAG=VALUE, more than once.")
_MINUTES = flags.DEFINE_float(
    "minutes", 8.0, "Since the start, after which no row is begun any more.", 0.0
)
_COMPILE_MINUTES = flags.DEFINE_float(
    "compile_minutes", 5.0, "Since the start, after which rows are timed beside the compiler.", 0.0
)
for name in ("out", "repeats", "vocab"):
    flags.declare_key_flag(name)
flags.adopt_module_key_flags(command)

_ON_ACCELERATOR = {
    "runs": [
        *("B:128x16x16/data", "XL:64x16x16/data", "XL:64x16x16/fsdp", "XXL:32x16x16/fsdp"),
        *("XL:64x16x16/data2-fsdp", "XL:64x16x16/tensor2"),
    ],
    "draw": "B:128x16x16",
    "images": 4096,
    "product": 8192,
}
_ON_CPU = {
    "runs": ["tiny:8x4x4/data", "tiny:8x4x4/fsdp"],
    "draw": "tiny:8x4x4",
    "images": 64,
    "product": 256,
}
_HOW = {"repeats": 5, "min_seconds": 0.3}
_HOW_ON_CPU = {"repeats": 2, "min_seconds": 0.0}
# Codes are compared on a batch of all devices; in float32 on part of one, as it takes longer.
_FLOAT32_PART = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A row to be made.

    Attributes:
      table: of `scaling_rows.TABLES`.
      label: fields of the row that say what it is.
      needs: names of the programs that it takes.
      make: the row, once they are there.
    """

    table: str
    label: dict
    needs: tuple[Hashable, ...]
    make: Callable[[], dict]


def main() -> None:
    """Prints the rows and writes the files."""
    begun = time.monotonic()
    passed = lambda: time.monotonic() - begun
    # Multicast of NCCL, before it starts: it can put GPUs out of service that a host shares.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    sizes = _ON_CPU if results.on_cpu() else _ON_ACCELERATOR
    counts, xla = _counts(), meshes.parse_flags(_XLA.value)
    texts = sizes["runs"] if _RUNS.value is None else _RUNS.value
    runs = meshes.parse_runs(texts, counts, list(xla))
    drawings = _drawings(sizes, counts)
    whole = runs[0] if runs and counts[-1] > 1 and _LOSS_STEPS.value else None
    lowers = {name: lower for run in runs for name, lower in mesh_rows.lower(run).items()}
    if whole:
        lowers |= mesh_rows.lower(mesh_rows.split(whole, counts[-1]))
    for drawing in drawings:
        lowers |= drawing.lowers

    kind = jax.devices()[0].device_kind
    print(f"{kind}, {counts[-1]} of them, jax {jax.__version__}", flush=True)
    programs = Compilation(lowers, {("step", run): xla[run.flags] for run in runs if run.flags})
    programs.wait(max(0.0, 60 * _COMPILE_MINUTES.value - passed()))
    print(f"{passed():.0f} s: {programs.unfinished} of {len(lowers)} programs not compiled yet")
    rows = Rows()
    about = {
        "device": kind,
        "devices": counts,
        "products": limits.product_flops_of_each(sizes["product"], **_how()),
        "versions": {"jax": jax.__version__, "lasad_jax": lasad_jax.__version__},
        "xla": xla,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    rows.write("about", about)
    rates = ", ".join(f"{rate / 1e12:.3g}" for rate in about["products"])
    print(f"products in bf16, all devices at once: {rates} TFLOP/s", flush=True)

    training = _run_parts(runs, programs)
    pending = [part for part in training if not part.label["flags"]]
    pending += [_losses_part(whole, counts[-1], programs)] if whole else []
    pending += _drawing_parts(drawings, programs)
    pending += [part for part in training if part.label["flags"]]
    for part in _in_turn(pending, programs, passed):
        rows.add(part.table, part.make())
    for part in pending:
        rows.add(part.table, part.label | {"skipped": f"{_MINUTES.value:g} minutes are over"})
    print(f"\n{passed():.0f} s")
    if programs.unfinished:
        # Threads of the compiler cannot be stopped, and Python would wait for them.
        sys.stdout.flush()
        os._exit(0)


def _counts() -> list[int]:
    """Numbers of devices, rising, from the one that all others are compared with."""
    there = len(jax.devices())
    if _DEVICES.value is None:
        return [2**i for i in range(there.bit_length())]
    if not all(text.isdigit() and 1 <= int(text) <= there for text in _DEVICES.value):
        raise ValueError(
            f"devices: {','.join(_DEVICES.value)!r} must be numbers from 1 to the {there} there are"
        )
    return sorted({1, *map(int, _DEVICES.value)})


def _drawings(sizes: dict, counts: list[int]) -> list[Drawing]:
    """Images on each number of devices; then those to compare, on one and on all."""
    text = sizes["draw"] if _DRAW.value is None else _DRAW.value
    if not text:
        return []
    case, most = GeneratorCase.parse(text, "draw"), counts[-1]
    images = _IMAGES.value or sizes["images"]
    timed = [Drawing(case, images, devices) for devices in counts]
    if most == 1:
        return timed
    both = [Drawing(case, case.batch * most, devices, temperature=0.0) for devices in (1, most)]
    if _FLOAT32.value:
        part = dataclasses.replace(case, batch=max(1, case.batch // _FLOAT32_PART))
        both += [Drawing(part, part.batch * most, devices, "float32") for devices in (1, most)]
    return timed + both


def _in_turn(
    pending: list[Part], programs: Compilation, passed: Callable[[], float]
) -> Iterator[Part]:
    """Takes parts out of the list, the first one whose programs are there, until time is over."""
    while pending and passed() < 60 * _MINUTES.value:
        for part in pending:
            if all(map(programs.done, part.needs)):
                pending.remove(part)
                yield part
                break
        else:
            time.sleep(_PAUSE)


def _run_parts(runs: list[Run], programs: Compilation) -> list[Part]:
    how, timed = _how(), {}

    def make(run: Run) -> dict:
        timed[run] = mesh_rows.time_row(run, programs, how)
        return with_efficiency(timed[run], timed[run.alone])

    # What it is compared with comes before it, and with the same programs is there no later.
    return [
        Part(
            "training",
            run.label,
            tuple(name for needed in (run.alone, run) for name in mesh_rows.lower(needed)),
            functools.partial(make, run),
        )
        for run in runs
    ]


def _how() -> dict:
    how = dict(_HOW_ON_CPU if results.on_cpu() else _HOW)
    return how | {"repeats": results.REPEATS.value or how["repeats"]}


def _losses_part(run: Run, devices: int, programs: Compilation) -> Part:
    needs = (*mesh_rows.lower(run), *mesh_rows.lower(mesh_rows.split(run, devices)))
    make = functools.partial(mesh_rows.losses_row, run, devices, programs, _LOSS_STEPS.value)
    return Part("losses", {"run": run.label["run"], "devices": devices}, needs, make)


def _drawing_parts(drawings: list[Drawing], programs: Compilation) -> list[Part]:
    timed, seen = {}, {}

    def make(drawing: Drawing) -> dict:
        timed[drawing], seen[drawing] = draw_rows.draw_row(drawing, programs, seen)
        return with_efficiency(timed[drawing], timed.get(drawing.alone, {}))

    return [
        Part(
            "drawing",
            drawing.label,
            (*drawing.alone.lowers, *drawing.lowers),
            functools.partial(make, drawing),
        )
        for drawing in drawings
    ]


if __name__ == "__main__":
    command.run(main)
