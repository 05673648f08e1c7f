"""The operator's benchmark: its clock, its floor, its tables and files, on tiny shapes."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from lasad_jax.benchmarks import operator, torch_peers
from lasad_jax.benchmarks.cases import Case, Shape, call, random_tokens
from lasad_jax.benchmarks.limits import copy_bytes_per_second
from lasad_jax.benchmarks.timing import (
    seconds_in_one_program,
    seconds_per_call,
)

TINY = [
    "--shapes=2x4x3x2",
    "--growth=1x4x4x2,1x4x8x2",
    "--dim=16",
    "--decays=selective,manhattan",
    "--dtypes=float32,bfloat16",
    "--repeats=2",
    "--copy_megabytes=1",
]


@pytest.fixture
def run_main(capsys):
    """Runs the command with these flags and returns what it prints."""

    def run(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["operator", *arguments])
            operator.main()
        return capsys.readouterr().out

    yield run
    flags.FLAGS.unparse_flags()


def test_table_files_and_skipped_peers(run_main, tmp_path):
    printed = run_main(*TINY, "--implementations=auto,chunked", f"--out={tmp_path}")
    results = json.loads((tmp_path / "operator.json").read_text())
    rows = results["rows"]
    assert len(rows) == 2 * 2 * 2 * 2  # dtypes, directions, decays, implementations
    tokens = [line for line in printed.splitlines() if line.startswith("| 2x4x3x2")]
    assert len(tokens) == len(rows)

    floors = {(row["dtype"], row["direction"]): row["floor_bytes"] for row in rows}
    elements = 2 * 12 * 2 * 16
    assert floors == {
        ("float32", "forward"): 16 * elements,
        ("float32", "forward+backward"): 44 * elements,
        ("bfloat16", "forward"): 8 * elements,
        ("bfloat16", "forward+backward"): 22 * elements,
    }
    fastest = max(results["copy_bytes_per_second"].values())
    for row in rows:
        assert "skipped" not in row
        assert len(row["runs"]) == 2
        assert row["seconds"] == pytest.approx(np.median(row["runs"]))
        assert row["over_floor"] == pytest.approx(row["seconds"] * fastest / row["floor_bytes"])
        theirs = row["peers"]["softmax (jax)"]
        assert row["ratios"]["softmax (jax)"] == pytest.approx(row["seconds"] / theirs)

    assert [row["tokens"] for row in results["growth"]] == [16] * 4 + [32] * 4
    for peer in ("softmax (torch)", "lightning (fla)", "retention (fla)"):
        assert f"skipped: {peer}: needs an NVIDIA GPU\n" in printed
        assert list(results["skipped"][peer]) == ["needs an NVIDIA GPU"]
    with Image.open(tmp_path / "operator.png") as picture:
        assert picture.size[0] > 500


def test_a_form_that_cannot_run_is_a_row_with_its_reason(run_main, monkeypatch):
    def refuse(*args, implementation, **kwargs):
        raise ValueError(f"{implementation}: not on this device")

    monkeypatch.setattr(operator.ops, "linear_attention", refuse)
    printed = run_main(*TINY, "--peers=", "--one_program")
    assert printed.count("ValueError: auto: not on this device") == 2 * 2 * 2 + 2 * 2


@pytest.mark.parametrize(
    ("flag", "name"),
    [("decays", "raster,circular"), ("dtypes", "float16"), ("peers", "x"), ("shapes", "4x4x2")],
)
def test_wrong_names_are_refused(run_main, flag, name):
    with pytest.raises(ValueError, match=f"^{flag}: .*{name.split(',')[-1]}"):
        run_main(*TINY, f"--{flag}={name}")


def test_seconds_per_call_of_a_known_sleep():
    seen = []

    def sleep(x):
        seen.append(x)
        time.sleep(0.004)
        return x

    waited = []
    sets = [(i,) for i in range(5)]
    runs = seconds_per_call(sleep, sets, repeats=3, min_seconds=0.05, wait=waited.append)
    assert len(runs) == 3
    assert 0.004 <= min(runs) < 0.01
    rounds = len(seen) // len(sets)
    assert seen == list(range(5)) * rounds  # inputs take turns
    assert waited == [list(range(5))] * 5  # one wait each: warm-up, estimate, three repeats
    assert 1 + 1 + 3 <= rounds <= 1 + 1 + 3 * 3


def test_one_program_returns_time_of_one_call():
    sets = [(jnp.full((4,), i),) for i in range(8)]
    wait = lambda x: jax.pure_callback(lambda x: (time.sleep(0.003), x)[1], x, x)
    runs = seconds_in_one_program(wait, sets, repeats=2)
    assert 0.002 < min(runs) < 0.02


def test_copy_speed():
    rates = copy_bytes_per_second(2**20, repeats=2)
    assert set(rates) == {"copy", "kernel"}
    assert all(1e6 < rate < 1e13 for rate in rates.values())


def test_calls_return_output_and_gradients_of_everything_learned():
    case = Case(Shape(1, 2, 3, 2, 4), "float32", "forward+backward")
    (q, k, v, d_o), other = random_tokens(case, 2)
    assert not np.array_equal(q, other[0])
    attention = lambda q, k, v, learned: learned["scale"] * q * k * v
    o, (dq, _, _, learned) = call(attention, case.direction)(q, k, v, d_o, {"scale": 2.0})
    np.testing.assert_allclose(o, 2 * q * k * v, rtol=1e-6)
    np.testing.assert_allclose(dq, 2 * k * v * d_o, rtol=1e-6)
    np.testing.assert_allclose(learned["scale"], jnp.sum(q * k * v * d_o), rtol=1e-4)


def test_softmax_of_both_frameworks_is_the_same():
    case = Case(Shape(2, 3, 4, 2, 16), "float32", "forward+backward")
    inputs = random_tokens(case, 1)[0]
    softmax = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    ours = jax.tree.leaves(call(softmax, case.direction)(*inputs))
    theirs = torch_peers.call(torch_peers.softmax(), case.direction)
    o, gradients = theirs(*(torch.tensor(np.array(x)) for x in inputs))
    for a, b in zip(ours, (o, *gradients), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)


def test_torch_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert torch_peers.answer({"peer": "softmax"}) == {"missing": "this PyTorch sees no GPU"}
    (q, *_), _ = torch_peers.draw((1, 6, 2, 4), "bfloat16", 2, "cpu")
    assert (tuple(q.shape), q.dtype) == ((1, 6, 2, 4), torch.bfloat16)
