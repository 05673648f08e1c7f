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
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

import lasad_jax
from lasad_jax import command, ops
from lasad_jax.benchmarks import report
from lasad_jax.benchmarks.cases import DECAYS, DTYPES, Shape, all_cases
from lasad_jax.benchmarks.ours import time_row
from lasad_jax.benchmarks.peers import PEERS, time_peers
from lasad_jax.benchmarks.timing import (
    MIN_SECONDS,
    copy_bytes_per_second,
    seconds_in_one_program,
    seconds_per_call,
)
from lasad_jax.files import whole_file

_SHAPES = flags.DEFINE_list("shapes", None, "BxRxCxH each; by device if unset.")
_GROWTH = flags.DEFINE_list("growth", None, "Shapes of the second table; by device if unset.")
_DIM = flags.DEFINE_integer("dim", 64, "Dk and Dv.", 1)
_DECAYS = flags.DEFINE_list("decays", list(DECAYS), "Decays; selective is raster with a gate.")
_DTYPES = flags.DEFINE_list("dtypes", list(DTYPES), "Of q, k and v.")
_FORMS = flags.DEFINE_list("implementations", ["auto"], "Rows for each; see ops.IMPLEMENTATIONS.")
_PEERS = flags.DEFINE_list("peers", list(PEERS), "What to compare with.")
_PATIENCE = flags.DEFINE_float("peer_seconds", 300, "What each peer in PyTorch may take.", 0)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timings of each, of which the median counts.", 1)
_ONE_PROGRAM = flags.DEFINE_bool(
    "one_program", True, "Compile a round of calls as one; else the host sends off each."
)
_COPY = flags.DEFINE_integer("copy_megabytes", None, "Size of the copy; by device if unset.", 1)
_OUT = flags.DEFINE_string("out", None, "Folder for operator.json and operator.png.")

_ON_ACCELERATOR = {
    "shapes": ["64x16x16x12", "32x24x24x16", "16x32x32x16", "4x64x64x16"],
    "growth": ["1x64x64x16", "1x64x128x16", "1x128x128x16"],
    "copy": 2048,
}
_ON_CPU = {"shapes": ["2x8x8x2"], "growth": ["1x8x8x2", "1x8x16x2", "1x16x16x2"], "copy": 64}


def main() -> None:
    """Prints the tables and writes the files."""
    on_cpu = jax.default_backend() == "cpu"
    sizes = _ON_CPU if on_cpu else _ON_ACCELERATOR
    given = lambda flag, name: sizes[name] if flag.value is None else flag.value
    shapes = [Shape.parse(text, _DIM.value) for text in given(_SHAPES, "shapes")]
    growth = [Shape.parse(text, _DIM.value) for text in given(_GROWTH, "growth")]
    _check_known("decays", _DECAYS.value, DECAYS)
    _check_known("dtypes", _DTYPES.value, DTYPES)
    _check_known("implementations", _FORMS.value, ops.IMPLEMENTATIONS)
    _check_known("peers", _PEERS.value, tuple(PEERS))
    how = {"repeats": _REPEATS.value, "min_seconds": 0 if on_cpu else MIN_SECONDS}

    copies = copy_bytes_per_second(given(_COPY, "copy") * 2**20, **how)
    fastest = max(copies.values())
    results = {
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "lasad_jax": lasad_jax.__version__},
        "dim": _DIM.value,
        "one_program": _ONE_PROGRAM.value,
        **how,
        "copy_bytes_per_second": copies,
    }
    print(f"{results['device']}, jax {jax.__version__}, heads of {_DIM.value}")
    print(f"copy: {fastest / 1e12:.3f} TB/s, read and written; times in microseconds")

    time_calls = functools.partial(
        seconds_in_one_program if _ONE_PROGRAM.value else seconds_per_call, **how
    )
    cases = all_cases(shapes, _DTYPES.value)
    peers = time_peers(_PEERS.value, cases, patience=_PATIENCE.value, time_calls=time_calls, **how)
    results["versions"] |= peers.versions
    results["skipped"] = peers.skipped
    for peer, reasons in peers.skipped.items():
        for reason, without in reasons.items():
            where = "" if len(without) == len(cases) else f" ({', '.join(without)})"
            print(f"skipped: {peer}{where}: {reason}")

    time_ours = functools.partial(
        time_row, bytes_per_second=fastest, time_calls=time_calls, peers=peers.times
    )
    columns = (*report.COLUMNS, *peers.times)
    print("\n" + report.head(columns))
    results["rows"] = []
    for case in cases:
        for decay in _DECAYS.value:
            for form in _FORMS.value:
                row = time_ours(case, decay, form)
                results["rows"].append(row)
                print(report.row_line(row, tuple(peers.times)), flush=True)
                _save(results)

    results["growth"] = []
    print("\nmanhattan on larger and larger images\n" + report.head(report.GROWTH_COLUMNS))
    for case in all_cases(growth, _DTYPES.value[:1]):
        for form in _FORMS.value:
            row = time_ours(case, "manhattan", form)
            results["growth"].append(row)
            print(report.growth_line(row), flush=True)
            _save(results)
    if _OUT.value:
        with whole_file(Path(_OUT.value) / "operator.png") as file:
            report.draw(results, file)


def _check_known(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is not one of {tuple(known)}")


def _save(results: dict) -> None:
    """After every row, so that a run cut short leaves what it had."""
    if _OUT.value:
        with whole_file(Path(_OUT.value) / "operator.json") as file:
            file.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    command.run(main)
