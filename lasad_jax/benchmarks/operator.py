"""Times the operator against the byte floor and against peers on the device at hand.

    python -m lasad_jax.benchmarks.operator [--out=FOLDER] [--decays=raster,manhattan]

Prints one table: for every shape, dtype and decay the microseconds of the forward pass and
of forward plus backward, the gradients of the learned rates and gate included. "floor" is
the time that moving every tensor once takes at the speed of a plain copy, measured first.
Behind each peer's time stands the ratio ours / theirs. A second table shows how the exact 2D
decay grows with the image. docs/kernels.md says how to read them.

Peers that are not installed or fail are named with the reason: cuDNN's and PyTorch's flash
attention, and flash-linear-attention's lightning attention and retention, also as CUDA graphs.
"""

import functools

from absl import flags

from lasad_jax import command, ops
from lasad_jax.benchmarks import report, results
from lasad_jax.benchmarks.cases import DECAYS, DTYPES, Shape, all_cases
from lasad_jax.benchmarks.ours import time_row
from lasad_jax.benchmarks.peers import PEERS, time_peers
from lasad_jax.benchmarks.tables import check_known, head, row_line
from lasad_jax.benchmarks.timing import MIN_SECONDS, seconds_in_one_program, seconds_per_call

_SHAPES = flags.DEFINE_list("shapes", None, "BxRxCxH each; by device if unset.")
_GROWTH = flags.DEFINE_list("growth", None, "Shapes of the second table; by device if unset.")
_DIM = flags.DEFINE_integer("dim", 64, "Dk and Dv.", 1)
_DECAYS = flags.DEFINE_list("decays", list(DECAYS), "Decays; selective is raster with a gate.")
_DTYPES = flags.DEFINE_list("dtypes", list(DTYPES), "Of q, k and v.")
_FORMS = flags.DEFINE_list("implementations", ["auto"], "Rows for each; see ops.IMPLEMENTATIONS.")
_PEERS = flags.DEFINE_list("peers", list(PEERS), "What to compare with.")
_PATIENCE = flags.DEFINE_float("peer_seconds", 300, "What each peer in PyTorch may take.", 0)
_ONE_PROGRAM = flags.DEFINE_bool(
    "one_program", True, "Compile a round of calls as one; else the host sends off each."
)
flags.adopt_module_key_flags(results)

_ON_ACCELERATOR = {
    "shapes": ["64x16x16x12", "32x24x24x16", "16x32x32x16", "4x64x64x16"],
    "growth": ["1x64x64x16", "1x64x128x16", "1x128x128x16"],
}
_ON_CPU = {"shapes": ["2x8x8x2"], "growth": ["1x8x8x2", "1x8x16x2", "1x16x16x2"]}


def main() -> None:
    """Prints the tables and writes the files."""
    sizes = _ON_CPU if results.on_cpu() else _ON_ACCELERATOR
    given = lambda flag, name: sizes[name] if flag.value is None else flag.value
    shapes = [Shape.parse(text, _DIM.value) for text in given(_SHAPES, "shapes")]
    growth = [Shape.parse(text, _DIM.value) for text in given(_GROWTH, "growth")]
    check_known("decays", _DECAYS.value, DECAYS)
    check_known("dtypes", _DTYPES.value, DTYPES)
    check_known("implementations", _FORMS.value, ops.IMPLEMENTATIONS)
    check_known("peers", _PEERS.value, tuple(PEERS))

    found = results.Results("operator", repeats=10, min_seconds=MIN_SECONDS)
    found |= {"dim": _DIM.value, "one_program": _ONE_PROGRAM.value}
    print(f"{found.header()}\nheads of {_DIM.value}; times in microseconds")

    time_calls = functools.partial(
        seconds_in_one_program if _ONE_PROGRAM.value else seconds_per_call, **found.how
    )
    cases = all_cases(shapes, _DTYPES.value)
    peers = time_peers(
        _PEERS.value, cases, patience=_PATIENCE.value, time_calls=time_calls, **found.how
    )
    found["versions"] |= peers.versions
    found["skipped"] = peers.skipped
    for peer, reasons in peers.skipped.items():
        for reason, without in reasons.items():
            where = "" if len(without) == len(cases) else f" ({', '.join(without)})"
            print(f"skipped: {peer}{where}: {reason}")

    time_ours = functools.partial(
        time_row, bytes_per_second=found.bytes_per_second, time_calls=time_calls, peers=peers.times
    )
    columns = report.columns(tuple(peers.times))
    print("\n" + head(columns))
    for case in cases:
        for decay in _DECAYS.value:
            for form in _FORMS.value:
                row = time_ours(case, decay, form)
                found.add("rows", row)
                print(row_line(row, columns), flush=True)

    print("\nmanhattan on larger and larger images\n" + head(report.GROWTH_COLUMNS))
    for case in all_cases(growth, _DTYPES.value[:1]):
        for form in _FORMS.value:
            row = time_ours(case, "manhattan", form)
            found.add("growth", row)
            print(row_line(row, report.GROWTH_COLUMNS), flush=True)
    with found.picture() as file:
        if file:
            report.draw(found, file)


if __name__ == "__main__":
    command.run(main)
