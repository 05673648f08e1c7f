"""Which kernels a training step or a token goes to: a table, from a trace."""

from collections.abc import Callable, Sequence

from absl import flags

from lasad_jax.benchmarks import traces
from lasad_jax.benchmarks.results import Results
from lasad_jax.benchmarks.tables import column, digits, head, microseconds, percent, row_line

KERNELS = flags.DEFINE_bool("kernels", False, "Show where the time of each case goes, by kernel.")
_LEAST_SHARE = 0.002  # of a kernel shown; the file has all

COLUMNS = (
    column("kernel", "kernel", width=40),
    column("launches", "launches", digits()),
    column("us", "seconds", microseconds),
    column("share", "share", percent),
)


def print_kernels(
    found: Results, row: dict, function: Callable, input_sets: Sequence[tuple], parts: int = 1
) -> None:
    """Traces calls for about a second and prints what each kernel takes of one.

    Args:
      found: where the rows are entered, as the table "kernels".
      row: "case" and "mixer" of what is called.
      function, input_sets: as in `traces.trace_calls`.
      parts: of a call, so that rows are of one: the tokens that it draws, for example.

    Raises:
      ValueError: where the profiler tells nothing of kernels, as on a CPU.
    """
    devices, calls = traces.trace_calls(function, input_sets)
    if not devices:
        raise ValueError("the profiler tells nothing of kernels on this device; it does on a GPU")
    kernels = traces.by_name(devices[0], calls * parts)
    found.add("kernels", row | {"kernels": kernels})
    print(f"\nkernels of {row['case']}, {row['mixer']}\n" + head(COLUMNS))
    for kernel in kernels:
        if kernel["share"] >= _LEAST_SHARE:
            print(row_line(kernel, COLUMNS), flush=True)
