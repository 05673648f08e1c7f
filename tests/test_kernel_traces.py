"""What a device's time goes to, from traces written by hand."""

import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lasad_jax.benchmarks import kernel_rows, traces


def kernels(name, *spans):
    """A line of a trace, in its text form: kernels and their spans in nanoseconds."""
    names = {"nccl": 1, "gemm": 2, "other": 3}
    events = "".join(
        f"events {{ metadata_id: {names[kernel]} offset_ps: {1000 * start} "
        f"duration_ps: {1000 * (end - start)} }}"
        for kernel, start, end in spans
    )
    return f'lines {{ name: "{name}" timestamp_ns: 100 {events} }}'


def plane(name, *lines):
    names = {
        1: "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)",
        2: "nvjet_gemm_fusion",
        3: "nvjet_gemm_fusion_12_1",
    }
    data = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{x}" }} }}' for i, x in names.items()
    )
    return f'planes {{ name: "{name}" {"".join(lines)} {data} }}'


def read(text):
    data = jax.profiler.ProfileData
    return traces.read_kernels(
        data.from_serialized_xspace(data.text_proto_to_serialized_xspace(text))
    )


def test_shares_of_a_trace_by_hand():
    first = plane(
        "/device:GPU:0",
        kernels("Stream #7(Compute)", ("gemm", 0, 40), ("gemm", 50, 60)),
        kernels("Stream #9(NcclAllReduce)", ("nccl", 30, 45), ("nccl", 55, 100)),
        kernels("XLA Modules", ("gemm", 0, 500)),
    )
    shares = traces.shares(read(first))
    assert shares.seconds == pytest.approx(100e-9)
    assert shares.compute == pytest.approx(0.50)
    assert shares.collectives == pytest.approx(0.60)
    assert shares.exposed == pytest.approx(0.45)  # 40 to 45 and 60 to 100
    second = plane("/device:GPU:1", kernels("Stream #7(Compute)", ("gemm", 0, 200)))
    host = plane("/host:CPU", kernels("Stream #7", ("nccl", 0, 1000)))
    both = traces.shares(read(first + second + host))
    assert both.seconds == pytest.approx(150e-9)
    assert both.compute == pytest.approx((0.50 + 1) / 2)
    assert both.exposed == pytest.approx(0.45 / 2)
    assert read(host) == []


def test_time_of_each_kernel_by_hand():
    nccl, gemm = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)", "nvjet_gemm_fusion"
    lines = (
        kernels("Stream #7(Compute)", ("gemm", 0, 40), ("gemm", 50, 60), ("other", 60, 70)),
        kernels("Stream #9(NcclAllReduce)", ("nccl", 30, 45), ("nccl", 90, 100)),
    )
    (device,) = read(plane("/device:GPU:0", *lines))
    rows = traces.by_name(device, calls=2)
    # Fusions that differ in their number alone are one; nothing runs from 45 to 50 and 70 to 90.
    times = {"kernel": [gemm, nccl, "none"], "launches": [1.5, 1, 0], "seconds": [30, 12.5, 12.5]}
    for key, values in times.items():
        factor = 1e-9 if key == "seconds" else 1
        expected = values if key == "kernel" else pytest.approx([factor * x for x in values])
        assert [row[key] for row in rows] == expected
    assert [row["share"] for row in rows] == pytest.approx([0.60, 0.25, 0.25])


def test_covered_is_the_length_of_the_union():
    rng = np.random.default_rng()
    for count in (0, 1, 7, 40):
        spans = np.sort(rng.integers(0, 200, (count, 2)), axis=1)
        cells = {cell for start, end in spans for cell in range(start, end)}
        assert traces.covered(spans.astype(np.float64)) == len(cells)


def test_a_cpu_tells_nothing_of_kernels():
    ran = []
    assert traces.trace_kernels(lambda: ran.append(jnp.ones(3).sum().block_until_ready())) == []
    assert len(ran) == 1


def test_calls_are_traced_for_about_a_second(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(traces, "trace_kernels", lambda run: run() or ["device"])
    for seconds, fewest, most in ((0.05, 10, 21), (0.6, 3, 4)):
        ran = []

        def call(x, seconds=seconds, ran=ran):
            time.sleep(seconds)
            ran.append(x)
            return jnp.zeros(())

        devices, count = traces.trace_calls(call, [("a",), ("b",)])
        assert devices == ["device"]
        assert fewest <= count <= most
        assert ran == ["a", *("ab" * count)[:count]]  # the first tells how many


def test_table_of_kernels(capsys, monkeypatch):
    spans = np.array([(0, 5e8), (6e8, 6.0001e8), (6.0001e8, 10e8)])
    device = traces.Kernels(["gemm", "loop_add_fusion_7", "gemm"], spans)
    traced = []

    def trace_calls(*call):
        traced.append(call)
        return [device] * 2, 3

    monkeypatch.setattr(traces, "trace_calls", trace_calls)
    found, case = [], {"case": "tiny:2x2x3", "mixer": "lasad"}
    results = types.SimpleNamespace(add=lambda *row: found.append(row))
    kernel_rows.print_kernels(results, case, "draw", [("weights",)], parts=5)
    assert traced == [("draw", [("weights",)])]
    ((table, row),) = found
    assert table == "kernels"
    assert row == case | {"kernels": traces.by_name(device, 15)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "kernels of tiny:2x2x3, lasad"
    shown = [re.split(r" *\| *", line)[1:-1] for line in lines[4:]]
    # Fusions of a ten thousandth are in the file alone.
    assert shown == [["gemm", "0.133", "59999", "90 %"], ["none", "0", "6667", "10 %"]]


def test_a_cpu_has_no_table_of_kernels_and_does_nothing_for_it():
    ran = []
    with pytest.raises(ValueError, match="tells nothing of kernels on this device"):
        kernel_rows.print_kernels(None, {}, ran.append, [(0,)])
    assert not ran
