"""Training steps on several devices: their time, what of it is communication, their losses."""

import dataclasses
import functools
import statistics
from collections.abc import Callable

import jax

from lasad_jax.benchmarks import plain, traces, train_rows
from lasad_jax.benchmarks.compiling import Compilation, compiled
from lasad_jax.benchmarks.limits import compiled_bytes
from lasad_jax.benchmarks.meshes import Run
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.timing import NUM_SETS, seconds_per_call
from lasad_jax.benchmarks.train_rows import Trainer
from lasad_jax.models import count_parameters, counts
from lasad_jax.training.goodput import peak_flops

# So far from 0 the steps of a run see keys of dropout that no other sees.
_OTHER_DROPOUT = 1_000_000


def lower(run: Run) -> dict[tuple[str, Run], Callable[[], jax.stages.Lowered]]:
    """What traces the programs of a run, under their names."""
    trace = {"step": train_rows.lower_step, "init": train_rows.lower_init}
    return {
        (what, run): functools.partial(lower, run.config, devices=run.devices)
        for what, lower in trace.items()
    }


def _trainer(run: Run, programs: Compilation, first_step: int = 0) -> Trainer:
    """The step and its first state; raises why there are none."""
    step, init = (compiled(programs.result((what, run))) for what in ("step", "init"))
    return Trainer(run.config, step, devices=run.devices, init=init, first_step=first_step)


def time_row(run: Run, programs: Compilation, how: dict) -> dict:
    """One row of the table: medians in seconds, or under "skipped" why there are none.

    Args:
      run: what to time.
      programs: with its own, of `lower`.
      how: repeats and min_seconds, as in `seconds_per_call`.
    """
    config = run.config
    row = run.label | {
        "parameters": count_parameters(config.model),
        "flops": counts.step_flops(config.model, config.batch_size * run.case.tokens),
    }
    try:
        trainer = _trainer(run, programs)
        # What else the host does meanwhile.
        row["compiling"] = programs.unfinished
        batches = [(trainer.batch(seed),) for seed in range(NUM_SETS)]
        runs = seconds_per_call(trainer, batches, **how)
        row |= _traced(trainer, batches)
    except Exception as error:  # a step that does not fit says so; the others go on
        return row | {"skipped": one_line(error)}
    step_seconds = statistics.median(runs)
    rate = config.batch_size / step_seconds
    row |= {
        "seconds": step_seconds,
        "runs": runs,
        "images_per_second": rate,
        "per_device": rate / run.devices,
        "memory_bytes": compiled_bytes(programs.result(("step", run))),
    }
    if peak := peak_flops(jax.devices()[0].device_kind):
        row["utilization"] = row["flops"] / step_seconds / run.devices / peak
    return row


def _traced(trainer: Trainer, batches: list[tuple]) -> dict:
    """What a trace of steps tells, if anything: times are those of one step."""
    try:
        devices, steps = traces.trace_calls(trainer, batches)
    except Exception as error:  # the row stands without
        return {"untraced": one_line(error)}
    if not devices:
        return {}
    shares = traces.shares(devices)
    return {
        "traced_seconds": shares.seconds / steps,
        "compute_seconds": shares.compute * shares.seconds / steps,
        "collectives": shares.collectives,
        "exposed": shares.exposed,
        "kernels": traces.by_name(devices[0], steps),
    }


def with_efficiency(row: dict, alone: dict) -> dict:
    """The row with its rate for each device over that of one device, if both have one."""
    if "per_device" not in row or "per_device" not in alone:
        return row
    return row | {"efficiency": row["per_device"] / alone["per_device"]}


def split(run: Run, devices: int) -> Run:
    """A run on one device with its batch split over several.

    Raises:
      ValueError: for a batch that they cannot share evenly.
    """
    if run.case.batch % devices:
        raise ValueError(
            f"runs: losses of {run.label['run']} cannot be compared on {devices} devices, which "
            "do not divide its batch; set another batch, or --loss_steps=0"
        )
    case = dataclasses.replace(run.case, batch=run.case.batch // devices)
    return Run(case, run.mesh, devices)


def losses_row(run: Run, devices: int, programs: Compilation, steps: int) -> dict:
    """Losses of the same steps on one device and on several, and with other dropout on one.

    Args:
      run: on one device.
      devices: to split its batch over.
      programs: with those of `run` and of its `split`.
      steps: to take.

    Returns:
      "losses" of the three, the "first" and the "last" of one device, and how far the others
      stray from it at most: "largest" on several devices, "noise" with other dropout. Or
      "skipped".
    """
    row = {"run": run.label["run"], "devices": devices, "steps": steps}
    ways = {"one device": (run, 0), f"{devices} devices": (split(run, devices), 0)}
    ways["other dropout"] = run, _OTHER_DROPOUT
    try:
        losses = {
            name: plain.losses(_trainer(way, programs, first), steps)
            for name, (way, first) in ways.items()
        }
    except Exception as error:
        return row | {"skipped": one_line(error)}
    largest, noise = plain.largest_differences(losses).values()
    first, *_, last = losses["one device"]
    ends = {"first": first, "last": last}
    return row | ends | {"largest": largest, "noise": noise, "losses": losses}
