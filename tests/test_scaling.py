"""The benchmark of several devices: rows on eight simulated ones, and what is left out."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from lasad_jax.benchmarks import (
    draw_rows,
    mesh_rows,
    meshes,
    scaling,
    scaling_rows,
    traces,
    train_rows,
)
from lasad_jax.benchmarks.compiling import Compilation, compile_all
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.models import SIZES, counts
from lasad_jax.training import sharding

NANO = {"num_layers": 1, "width": 32, "num_heads": 2}
FLAGS = ["--vocab=64", "--repeats=2", "--runs=tiny:8x2x3/fsdp", "--devices=8"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """The smallest size is smaller still, and flags are parsed for the length of a test."""
    monkeypatch.setitem(SIZES, "tiny", NANO)
    with flagsaver.flagsaver():
        flags.FLAGS(["scaling", *FLAGS])
        yield
    flags.FLAGS.unparse_flags()


def run_main(*arguments):
    flags.FLAGS(["scaling", *FLAGS, *arguments])
    scaling.main()


def read_rows(folder):
    tables = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        tables.setdefault(row.pop("table"), []).append(row)
    return tables


def test_rows_of_eight_devices(tmp_path, capsys, monkeypatch):
    # Without those at temperature 0, to save time.
    drawings = scaling._drawings
    monkeypatch.setattr(
        scaling, "_drawings", lambda *args: [x for x in drawings(*args) if x.temperature]
    )
    run_main("--draw=tiny:4x2x3", "--images=40", "--loss_steps=6", f"--out={tmp_path}")
    tables = read_rows(tmp_path)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(printed) == sum(len(tables[name]) for name in scaling_rows.TABLES)
    (about,) = tables["about"]
    assert about["devices"] == [1, 8]
    assert len(about["products"]) == 8
    assert all(1e7 < rate < 1e15 for rate in about["products"])

    training = tables["training"]
    assert [(row["run"], row["devices"]) for row in training] == [
        ("tiny:8x2x3/data", 1),
        ("tiny:8x2x3/fsdp", 8),
    ]
    alone, split = training
    model = GeneratorCase.parse("tiny:8x2x3").model("lasad")
    for row in training:
        images = 8 * row["devices"]
        assert row["seconds"] == pytest.approx(np.median(row["runs"]))
        assert row["images_per_second"] == pytest.approx(images / row["seconds"])
        assert row["per_device"] == pytest.approx(8 / row["seconds"])
        assert row["efficiency"] == pytest.approx(alone["seconds"] / row["seconds"])
        assert row["flops"] == counts.step_flops(model, 6 * images)
        assert row["compiling"] == 0
        # A CPU tells of none of these.
        assert not {"exposed", "compute_seconds", "utilization", "skipped"} & set(row)
    # Parameters and AdamW's moments of a device: all of them, or an eighth.
    assert alone["memory_bytes"] - split["memory_bytes"] > 0.7 * 12 * alone["parameters"]

    (losses,) = tables["losses"]
    curves = losses["losses"]
    assert list(curves) == ["one device", "8 devices", "other dropout"]
    assert losses["first"] == pytest.approx(np.log(64), rel=1e-4)
    assert losses["last"] == curves["one device"][-1] < losses["first"]
    assert losses["largest"] == max(
        abs(a - b) for a, b in zip(curves["one device"], curves["8 devices"], strict=True)
    )
    assert losses["largest"] < 0.3 * losses["noise"]

    drawn = [(row["dtype"], row["temperature"], row["devices"]) for row in tables["drawing"]]
    kinds = [("bfloat16", 1.0), ("float32", 1.0)]
    assert drawn == [(*kind, devices) for kind in kinds for devices in (1, 8)]
    for one, all_of_them in zip(*(iter(tables["drawing"]),) * 2, strict=True):
        assert one["images_per_second"] == pytest.approx(one["images"] / one["seconds"])
        faster = one["seconds"] / all_of_them["seconds"]
        assert all_of_them["efficiency"] == pytest.approx(faster / 8)
        assert "same_images" not in one
        assert 0 <= all_of_them["same_images"] <= all_of_them["same_codes"] <= 1
    assert [row["images"] for row in tables["drawing"]] == [40, 40, 8, 8]
    assert tables["drawing"][-1]["same_images"] == 1  # in float32, to the bit
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.size[0] > 500


def test_other_codes_are_told_apart(monkeypatch):
    drawing = draw_rows.Drawing(GeneratorCase.parse("tiny:2x2x3"), 4, 2)
    tokens = {1: np.arange(24).reshape(4, 6), 2: np.arange(24).reshape(4, 6)}
    tokens[2][3, 4:] = 0
    monkeypatch.setattr(
        draw_rows, "sample_tokens", lambda config, params, labels, mesh, **_: tokens[mesh.size]
    )
    lower = lambda: jax.jit(jnp.sin).lower(1.0)
    names = [*drawing.lowers, *drawing.alone.lowers]
    programs = Compilation(dict.fromkeys(names, lower))
    _, seen = draw_rows.draw_row(drawing.alone, programs, {})
    row, _ = draw_rows.draw_row(drawing, programs, {drawing.alone: seen})
    assert (row["same_images"], row["same_codes"]) == (3 / 4, 22 / 24)


def test_a_run_that_fails_is_a_row_with_its_reason(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: too large\nand more")

    for module, name in (
        (train_rows, "lower_step"),
        (train_rows, "lower_init"),
        (draw_rows, "lower_programs"),
    ):
        monkeypatch.setattr(module, name, refuse)
    run_main("--draw=tiny:1x2x3", f"--out={tmp_path}")
    for table in scaling_rows.TABLES:
        rows = read_rows(tmp_path)[table]
        assert rows
        for row in rows:
            assert row["skipped"] == "RuntimeError: RESOURCE_EXHAUSTED: too large"
            assert "efficiency" not in row


class Slow:
    """Stands for programs of which some are never there."""

    def __init__(self, lowers=(), options=None, done=()):
        self.unfinished, self._done = len(lowers), done

    def wait(self, seconds):
        assert seconds == 0

    def done(self, name):
        return name in self._done


def test_what_time_does_not_reach_is_told(monkeypatch, tmp_path, capsys):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(scaling, "Compilation", Slow)
    monkeypatch.setattr(scaling, "os", types.SimpleNamespace(environ={}, _exit=leave))
    xla = "--xla=early:xla_gpu_all_reduce_combine_threshold_bytes=1"
    with pytest.raises(SystemExit, match=r"^0$"):
        run_main("--minutes=0", "--compile_minutes=0", xla, f"--out={tmp_path}")
    tables = read_rows(tmp_path)
    assert [row["flags"] for row in tables["training"]] == ["", "", "early"]
    drawn = [(row["images"], row["dtype"], row["temperature"]) for row in tables["drawing"]]
    assert drawn[::2] == drawn[1::2]
    assert drawn[::2] == [(64, "bfloat16", 1.0), (64, "bfloat16", 0.0), (16, "float32", 1.0)]
    for table in scaling_rows.TABLES:
        assert {row["skipped"] for row in tables[table]} == {"0 minutes are over"}
    assert scaling.os.environ == {"NCCL_NVLS_ENABLE": "0"}
    assert capsys.readouterr().out.count("0 minutes are over") == 3 + 1 + 6


def test_what_is_compiled_comes_first():
    seconds = [0.0]
    parts = [scaling.Part("training", {}, tuple(needs), None) for needs in ("ab", "b", "c", "")]
    programs = Slow(done=["b"])
    order = scaling._in_turn(pending := list(parts), programs, lambda: seconds[0])
    assert next(order) is parts[1]
    programs._done.append("a")
    assert next(order) is parts[0]
    assert next(order) is parts[3]
    assert pending == [parts[2]]
    seconds[0] = 1e9
    assert list(order) == []


def test_runs_and_flags_are_read():
    texts = ["tiny:2x2x3/data", "tiny:2x2x3/fsdp", "tiny:2x2x3/data2-fsdp", "tiny:4x2x3/tensor2"]
    runs = meshes.parse_runs(texts, [1, 2, 8], ["late"])
    assert [(run.mesh, run.case.batch, run.devices, run.flags) for run in runs] == [
        *[("data", 2, devices, "") for devices in (1, 2, 8)],
        *[("fsdp", 2, devices, "") for devices in (2, 8)],
        ("data2-fsdp", 2, 8, ""),
        *[("data", 4, 1, ""), ("tensor2", 4, 8, "")],
        *[("data", 2, 8, "late"), ("fsdp", 2, 8, "late")],
    ]
    sizes = {
        run.mesh: sharding.make_mesh(run.config.mesh).devices.shape
        for run in runs[2:]
        if run.devices == 8
    }
    assert sizes == {
        "data": (1, 8, 1, 1),
        "fsdp": (1, 1, 8, 1),
        "data2-fsdp": (1, 2, 4, 1),
        "tensor2": (1, 4, 1, 2),
    }
    assert {run.config.batch_size for run in runs if run.devices == 8} == {16, 32}
    two = meshes.parse_runs(texts, [1, 2], [])
    assert [run.mesh for run in two if run.devices == 2] == ["data", "fsdp", "tensor2"]
    found = meshes.parse_flags(["a:--x=true,y=17", "b:z=ON"])
    assert found == {"a": {"x": True, "y": 17}, "b": {"z": "ON"}}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("runs", "tiny:2x2x3/ring"),
        ("runs", "tiny:2x2/data"),
        ("runs", "tiny:4x2x3/data"),  # losses: four images for eight devices
        ("devices", "1,9"),
        ("devices", "two"),
        ("draw", "tiny"),
        ("xla", "name"),
        ("xla", "name:flag"),
    ],
)
def test_wrong_flags_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"^{flag}: "):
        run_main(f"--{flag}={value}")


def test_compilation_keeps_what_failed_and_takes_flags():
    def untraceable():
        raise TypeError("no")

    lower = lambda: jax.jit(jnp.sin).lower(1.0)
    found = compile_all({"sin": lower, "none": untraceable})
    assert found["sin"](0.0) == 0
    assert isinstance(found["none"], TypeError)
    programs = Compilation({"plain": lower, "wrong": lower}, {"wrong": {"xla_no_such_flag": True}})
    programs.wait()
    assert programs.unfinished == 0
    assert programs.result("plain")(0.0) == 0
    assert "xla_no_such_flag" in str(programs.result("wrong"))


def test_what_a_trace_tells_stands_in_the_row(monkeypatch):
    gemm, nccl = "nvjet_gemm", "ncclDevKernel_AllReduce"
    spans = np.array([(0, 6e8), (5e8, 8e8)])
    found = [traces.Kernels([gemm, nccl], spans)] * 2
    monkeypatch.setattr(traces, "trace_calls", lambda function, input_sets: (found, 4))
    row = mesh_rows._traced(None, [])
    kernels = row.pop("kernels")
    assert row == pytest.approx(
        {"traced_seconds": 0.2, "compute_seconds": 0.15, "collectives": 0.375, "exposed": 0.25}
    )
    assert [k["kernel"] for k in kernels] == [gemm, nccl, "none"]
