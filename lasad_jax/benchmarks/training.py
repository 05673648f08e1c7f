"""Times training steps of whole generators, LASAD against softmax attention.

    python -m lasad_jax.benchmarks.training [--out=FOLDER] [--cases=B:128x16x16,XL:64x16x16]

Prints one table: for every case (size, batch, grid) and mixer the time of the real step (AdamW,
clipping, dropout, bf16, the state donated) on random codes, its FLOPs against those of a large
matrix product in the same run, its memory, and what LlamaGen takes where that was measured. A
second table shows the cost of a token as images grow. docs/speed.md says how to read them.

    --kernels          also: where the time of each step goes, by kernel (on a GPU)
    --loader           also: how long the loop waits for stored codes
    --plain_steps=200  also: losses against those of the plain path
"""

import functools
import itertools

from absl import flags

from lasad_jax import command
from lasad_jax.benchmarks import (
    generators,
    kernel_rows,
    llamagen,
    plain,
    plots,
    results,
    train_rows,
)
from lasad_jax.benchmarks.compiling import compile_all, compiled
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.limits import product_flops_per_second
from lasad_jax.benchmarks.tables import (
    Column,
    column,
    digits,
    gigabytes,
    head,
    milliseconds,
    percent,
    ratio,
    row_line,
)
from lasad_jax.benchmarks.timing import NUM_SETS

_SCALING = flags.DEFINE_list("scaling", None, "Cases of the second table; by device if unset.")
_EMA = flags.DEFINE_bool("ema", False, "Keep an average of the parameters, as runs do.")
_LOADER = flags.DEFINE_bool("loader", False, "Time the loop on stored codes, with the first case.")
_PLAIN_STEPS = flags.DEFINE_integer(
    "plain_steps", 0, "Steps of the first case to compare with the plain path.", 0
)
for module in (results, generators, kernel_rows):
    flags.adopt_module_key_flags(module)

# A larger case comes later: the allocator's peak is of the whole process, and only then known.
_ON_ACCELERATOR = {
    "cases": ["B:128x16x16", "L:64x16x16", "XL:64x16x16"],
    "scaling": ["B:128x16x16", "B:56x24x24", "B:32x32x32", "B:8x64x64"],
    "product": 8192,
    "loader": {"steps": 300, "images": 20_000, "wait_every": 50},
}
_ON_CPU = {
    "cases": ["tiny:2x4x4"],
    "scaling": ["tiny:4x4x4", "tiny:1x8x8"],
    "product": 512,
    "loader": {"steps": 10, "images": 100, "wait_every": 5},
}

COLUMNS = (
    column("case", "case", width=12),
    column("tokens", "tokens"),
    column("mixer", "mixer"),
    column("parameters", "parameters", digits(1e-6, " M")),
    column("ms", "seconds", milliseconds),
    column("images/s", "images_per_second", digits()),
    column("TFLOP/s", "flops_per_second", digits(1e-12)),
    column("of product", "of_product", percent),
    column("GB", "memory_bytes", gigabytes),
    column("GB allocated", "allocator_bytes", gigabytes),
    column("/ softmax", "over_softmax", ratio),
    column("LlamaGen", "llamagen", lambda peer: digits()(peer["images_per_second"])),
    column("/ LlamaGen", "over_llamagen", ratio),
    column("its GB", "llamagen", lambda peer: gigabytes(peer["memory_bytes"])),
)


def _per_thousand(row: dict) -> str | None:
    return digits(1e6)(row["seconds_per_token"]) if "seconds_per_token" in row else None


SCALING_COLUMNS = (
    *COLUMNS[:3],
    column("ms", "seconds", milliseconds),
    Column("ms / 1000 tokens", _per_thousand),
    column("GB", "memory_bytes", gigabytes),
    column("/ softmax", "over_softmax", ratio),
)


def main() -> None:
    """Prints the tables and writes the files."""
    sizes = _ON_CPU if results.on_cpu() else _ON_ACCELERATOR
    parse = lambda flag, name: [
        GeneratorCase.parse(text, name)
        for text in (sizes[name] if flag.value is None else flag.value)
    ]
    cases, scaling = parse(generators.CASES, "cases"), parse(_SCALING, "scaling")
    mixers = generators.mixers()
    if not cases and (_LOADER.value or _PLAIN_STEPS.value):
        raise ValueError("cases: none given; --loader and --plain_steps take the first one")

    found = results.Results("training", repeats=10, min_seconds=0.5)
    product = product_flops_per_second(sizes["product"], **found.how)
    found |= {"product_flops_per_second": product, "ema": _EMA.value, "llamagen": llamagen.SOURCE}
    print(found.header())
    print(f"matrix product of bf16: {product / 1e12:.3g} TFLOP/s; LlamaGen: {llamagen.SOURCE}")

    config_of = functools.partial(train_rows.run_config, ema=_EMA.value)
    programs = {
        (case, mixer): functools.partial(train_rows.lower_step, config_of(case, mixer))
        for case, mixer in itertools.product(dict.fromkeys([*cases, *scaling]), mixers)
    }
    for mixer in mixers if _PLAIN_STEPS.value else ():
        for name, (config, make_step) in plain.ways(cases[0], mixer).items():
            programs[mixer, name] = functools.partial(train_rows.lower_step, config, make_step)
    steps = compile_all(programs)

    # What stands in both tables is timed once.
    @functools.cache
    def time_case(case: GeneratorCase, mixer: str) -> dict:
        step = steps[case, mixer]
        row = train_rows.time_row(
            case, mixer, step, ema=_EMA.value, product_flops_per_second=product, how=found.how
        )
        baseline = time_case(case, "softmax") if mixer != "softmax" and "softmax" in mixers else {}
        return row | generators.over_softmax(row, baseline)

    for name, chosen, columns in (("rows", cases, COLUMNS), ("scaling", scaling, SCALING_COLUMNS)):
        print("\n" + head(columns))
        for case, mixer in itertools.product(chosen, mixers):
            row = time_case(case, mixer)
            found.add(name, row)
            print(row_line(row, columns), flush=True)
    if scaling:
        with found.picture() as file:
            if file:
                plots.draw_scaling(found["scaling"], found["device"], file)

    for case, mixer in itertools.product(cases, mixers) if kernel_rows.KERNELS.value else ():
        step = steps[case, mixer]
        results.or_skip("kernels", _kernels, found, case, config_of(case, mixer), step)
    for mixer in mixers if _LOADER.value else ():
        config, step = config_of(cases[0], mixer), steps[cases[0], mixer]
        of_first = cases[0], config, step, sizes["loader"]
        results.or_skip("loop on stored codes", _loader, found, *of_first)
    for mixer in mixers if _PLAIN_STEPS.value else ():
        results.or_skip("curves", _curves, found, cases[0], mixer, steps)


def _kernels(found: results.Results, case: GeneratorCase, config, step) -> None:
    """Prints what each kernel takes of a step."""
    trainer = train_rows.Trainer(config, compiled(step))
    batches = [(trainer.batch(seed),) for seed in range(NUM_SETS)]
    row = {"case": str(case), "mixer": config.model.mixer}
    kernel_rows.print_kernels(found, row, trainer, batches)


def _loader(found: results.Results, case: GeneratorCase, config, step, sizes: dict) -> None:
    """Prints how long the loop waits for stored codes."""
    row = train_rows.loader_row(train_rows.Trainer(config, compiled(step)), case, **sizes)
    found.add("loader", row)
    print(
        f"\nloop on stored codes, {case}, {config.model.mixer}: {percent(row['share'])} of the "
        f"time waits for the next batch; {milliseconds(row['seconds'])} ms a step, "
        f"{milliseconds(row['seconds_on_device'])} with codes on the device",
        flush=True,
    )


def _curves(found: results.Results, case: GeneratorCase, mixer: str, steps: dict) -> None:
    """Prints how far the losses are from those of the plain path, and draws them."""
    curves = {}
    for name, (config, _) in plain.ways(case, mixer).items():
        trainer = train_rows.Trainer(config, compiled(steps[mixer, name]))
        curves[name] = plain.losses(trainer, _PLAIN_STEPS.value)
    largest = plain.largest_differences(curves)
    row = {"case": str(case), "mixer": mixer, "largest_difference": largest, "losses": curves}
    found.add("curves", row)
    losses = curves["plain"]
    print(
        f"\n{case}, {mixer}: loss from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    )
    for name, difference in largest.items():
        print(f"largest difference from the plain path: {name}: {difference:.2e}", flush=True)
    with found.picture(f"_curves_{mixer}") as file:
        if file:
            plots.draw_losses(curves, file)


if __name__ == "__main__":
    command.run(main)
