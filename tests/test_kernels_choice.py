"""Which fused kernels are chosen where, why others are refused, and the operator over them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import interpreted, on, quick_jit
from ops_cases import assert_close, make_decay

from lasad_jax.ops import (
    ManhattanDecay,
    NoDecay,
    RasterDecay,
    SequenceDecay,
    linear_attention,
    manhattan,
    resolve_implementation,
    step,
)
from lasad_jax.ops.kernels import choice

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)

# Choice


def arguments(family=RasterDecay, num_tokens=256, widths=(64, 64), dtype=jnp.bfloat16, **changes):
    q, v = (jax.ShapeDtypeStruct((2, num_tokens, 4, width), dtype) for width in widths)
    return {"q": q, "v": v, "decay": make_decay(family), "num_prefix": 1} | changes


@pytest.mark.parametrize(
    ("device", "kernels", "changes"),
    [
        pytest.param("H200", "mosaic_gpu", {}, marks=NEEDS_JAX_11),
        ("H200", "triton", {"num_tokens": 257}),
        ("H200", "triton", {"num_tokens": 56}),
        ("H200", "triton", {"num_prefix": 2}),
        ("H200", "triton", {"widths": (64, 128)}),
        ("H200", "triton", {"dtype": jnp.float32}),
        ("H200", "triton", {"family": ManhattanDecay}),
        ("A100", "triton", {}),
        ("A100", "triton", {"dtype": jnp.float32, "widths": (16, 32)}),
        ("A100", None, {"dtype": jnp.float16}),
        ("A100", None, {"dtype": jnp.float64}),
        ("A100", None, {"widths": (48, 64)}),
        ("H200", "triton", {"family": ManhattanDecay, "num_tokens": 65536}),
        ("v5e", "mosaic_tpu", {}),
        ("v6e", "mosaic_tpu", {"dtype": jnp.float32, "family": ManhattanDecay}),
        ("v5e", None, {"dtype": jnp.float64}),
    ],
)
def test_best_kernels_of_a_device(device, kernels, changes):
    with jax.enable_x64(True), on(device):
        args = arguments(**changes)
        assert choice.choose(**args) == kernels
        for stateful in (False, True):
            resolved = resolve_implementation("auto", **args, stateful=stateful)
            assert resolved == (kernels or "chunked")


def test_a_cpu_runs_no_kernels():
    assert choice.choose(**arguments()) is None
    auto = functools.partial(resolve_implementation, "auto")
    assert auto(**arguments(num_tokens=64), stateful=False) == "quadratic"
    assert auto(**arguments(), stateful=False) == "chunked"
    assert auto(**arguments(num_tokens=64), stateful=True) == "chunked"


@pytest.mark.parametrize(
    ("device", "name", "changes", "reason"),
    [
        ("v5e", "triton", {}, r"needs a GPU, not TPU v5 lite \(tpu\)"),
        ("H200", "mosaic_tpu", {}, r"needs a TPU, not NVIDIA H200 \(gpu\)"),
        ("A100", "triton", {"widths": (48, 64)}, r"\(16, 32, 64, 128\), not 48 and 64"),
        ("A100", "triton", {"dtype": jnp.float64}, "bfloat16 or float32, .*not float64"),
        ("H200", "mosaic_gpu", {"family": ManhattanDecay}, "no 2D decay; use 'triton'"),
    ],
)
def test_refusals_say_why(device, name, changes, reason):
    message = rf"^implementation: '{name}' cannot run here: .*{reason}"
    with jax.enable_x64(True), on(device), pytest.raises(ValueError, match=message):
        resolve_implementation(name, **arguments(**changes), stateful=False)


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        ("A100", {}, "needs a Hopper GPU .*, not NVIDIA A100"),
        ("H200", {"dtype": jnp.float32}, "bfloat16 of Dk = Dv = 64, not float32 of 64, 64"),
        ("H200", {"widths": (64, 128)}, "not bfloat16 of 64, 128"),
        ("H200", {"num_tokens": 257}, "multiple of 8 tokens, at least 64, not 257"),
        ("H200", {"num_tokens": 56}, "at least 64, not 56"),
        ("H200", {"num_prefix": 2}, "one prefix token, not 2; use 'triton'"),
    ],
)
def test_refusals_of_hopper_kernels_say_why(device, changes, reason):
    with on(device), pytest.raises(ValueError, match=reason):
        resolve_implementation("mosaic_gpu", **arguments(**changes), stateful=False)


def test_old_jax_has_no_hopper_kernels(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with on("H200"):
        assert choice.choose(**arguments()) == "triton"
        with pytest.raises(ValueError, match=r"needs jax 0\.11 or later, not 0\.10\.2"):
            resolve_implementation("mosaic_gpu", **arguments(), stateful=False)


def test_one_type_for_all():
    args = arguments() | {"v": jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)}
    with on("H200"):
        assert choice.choose(**args) is None
        assert "the same for all" in choice.obstacle("triton", **args)


def test_a_named_implementation_fails_before_it_runs():
    q = jnp.zeros((1, 5, 4, 16))
    with pytest.raises(ValueError, match="'triton' cannot run here: it needs a GPU, not cpu"):
        linear_attention(q, q, q, make_decay(NoDecay), grid=(2, 2), implementation="triton")


def test_few_heads_of_long_sequences_are_split():
    q = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    segments = choice.recurrence("triton", q, q).segments
    assert [segments(8, 64), segments(64, 64), segments(128, 64), segments(8, 15)] == [8, 4, 2, 1]
    assert choice.recurrence("mosaic_tpu", q, q).segments(8, 64) == 1


# The operator


@pytest.fixture
def kernels_on_cpu(monkeypatch, name):
    """Makes `implementation=name` run interpreted kernels, with several chunks."""
    device = ("tpu", "TPU v5 lite") if name == "mosaic_tpu" else ("gpu", "NVIDIA H200")
    manhattan = choice.manhattan

    def interpreted_manhattan(name, columns, num_prefix):
        kernels = manhattan(name, columns, num_prefix).keywords
        both = {
            way: functools.partial(kernels[way], interpret=True) for way in ("forward", "backward")
        }
        return functools.partial(manhattan(name, columns, num_prefix), **both)

    def recurrence(name, q, v):
        chunk = None if name == "mosaic_gpu" else 32
        return interpreted(name, q.dtype, (q.shape[3], v.shape[3]), chunk=chunk)

    monkeypatch.setattr(choice, "device", lambda: choice.Device(*device))
    monkeypatch.setattr(choice, "recurrence", recurrence)
    monkeypatch.setattr(choice, "manhattan", interpreted_manhattan)


def operator_args(family, num_tokens, gated, *, width=16, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.standard_normal((3, batch, num_tokens, 2, width)), dtype)
    gate = -rng.exponential(0.3, q.shape[:3]).astype(np.float32)
    rates = np.array([1e-3, 0.7], np.float32)
    return q, k, v, make_decay(family, rates), gate if gated else None


@functools.partial(quick_jit, static_argnums=(2, 3, 4))
def with_gradients(args, cotangent, implementation, grid, num_prefix):
    def operator(q, k, v, decay, log_gate):
        return linear_attention(
            q, k, v, decay, grid=grid, num_prefix=num_prefix, log_gate=log_gate,
            implementation=implementation,
        )  # fmt: skip

    out, pullback = jax.vjp(operator, *args)
    names = ("q", "k", "v", "rates", "log_gate")
    return {"out": out, **dict(zip(names, pullback(cotangent), strict=True))}


@pytest.mark.parametrize(
    ("name", "family", "gated", "num_prefix"),
    [
        ("triton", NoDecay, False, 0),
        ("triton", SequenceDecay, False, 3),
        ("triton", RasterDecay, True, 1),
        ("triton", ManhattanDecay, False, 3),
        ("mosaic_tpu", RasterDecay, True, 3),
        ("mosaic_tpu", ManhattanDecay, False, 1),
        pytest.param("mosaic_gpu", RasterDecay, True, 1, marks=NEEDS_JAX_11),
    ],
)
def test_operator_equals_the_chunked_form(name, family, gated, num_prefix, kernels_on_cpu):
    """On a part of an image, gradients too."""
    hopper = name == "mosaic_gpu"
    dtype, own = (jnp.bfloat16, {"width": 64, "batch": 1}) if hopper else (jnp.float32, {})
    args = operator_args(family, 64 if hopper else 50, gated, dtype=dtype, **own)
    # Exact in bf16, like the tokens: both forms start from the same numbers.
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)
    cotangent = args[0][:, ::-1]
    static = (9, 8), num_prefix
    got = with_gradients(args, cotangent, name, *static)
    want = with_gradients(exact, cotangent.astype(jnp.float32), "chunked", *static)
    assert got["out"].dtype == dtype
    # Gradients of rates are sums over all tokens, whose parts partly cancel.
    assert_close(got, want, 1e-2 if hopper else 1e-5)


@functools.partial(quick_jit, static_argnames=("implementation", "grid", "num_prefix"))
def piece(q, k, v, decay, log_gate, state, **options):
    return linear_attention(
        q, k, v, decay, log_gate=log_gate, initial_state=state, return_state=True, **options
    )


def in_pieces(args, bounds, **options):
    """Outputs and last state of one call for each stretch between bounds."""
    (*tokens, decay, gate), state, outs = args, None, []
    for start, end in itertools.pairwise(bounds):
        own = [x[:, start:end] for x in tokens]
        own_gate = None if gate is None else gate[:, start:end]
        out, state = piece(*own, decay, own_gate, state, **options)
        outs.append(out)
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize(
    ("name", "family", "bounds"),
    [
        ("triton", RasterDecay, (0, 2, 50)),
        ("mosaic_tpu", RasterDecay, (0, 37, 50)),
        ("triton", ManhattanDecay, (0, 37, 50)),
    ],
)
def test_states_go_between_kernels_and_steps(name, family, bounds, kernels_on_cpu):
    """A second call may start within the prefix; `step` takes over where the last one ends."""
    options = {"grid": (8, 8), "num_prefix": 3}
    args = operator_args(family, bounds[-1] + 1, family is RasterDecay)
    out, state = in_pieces(args, bounds, implementation=name, **options)
    *token, gate = (None if x is None else x[:, -1] for x in (*args[:3], args[4]))
    decay = args[3]
    last, state = step(state, *token, decay, grid=(8, 8), log_gate=gate)
    want, end = in_pieces(args, (0, bounds[-1] + 1), implementation="chunked", **options)
    assert_close(jnp.concatenate([out, last[:, None]], axis=1), want, 1e-5)
    assert_close(state, end, 1e-5)


@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_long_images_are_cut_into_blocks(name, kernels_on_cpu, monkeypatch):
    """Three blocks of the 2D decay, the last not full, with states between them."""
    monkeypatch.setattr(choice, "LONGEST_MANHATTAN", 10)
    monkeypatch.setitem(manhattan._SMALLEST_BLOCK, "fused", (3, 1))
    args = operator_args(ManhattanDecay, 1 + 7 * 5 + 2, False)
    static = (8, 5), 1
    got = with_gradients(args, args[0][:, ::-1], name, *static)
    want = with_gradients(args, args[0][:, ::-1], "chunked", *static)
    assert_close(got, want, 1e-5)


def test_heads_are_mixed_in_one_kernel_where_it_can_run():
    """And where heads are enough to fill the device, one program each."""
    shape = lambda batch=64, num_tokens=256, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        (batch, num_tokens, 12, 200), dtype
    )
    able = jax.__version_info__ >= (0, 11)
    good = {"y": shape(), "widths": (32, 64), "decay": NoDecay()}
    with on("H200"):
        assert choice.mixes_heads(**good) == able
        for changes in (
            {"y": shape(dtype=jnp.float32)},
            {"y": shape(num_tokens=257)},
            {"y": shape(num_tokens=56)},
            {"widths": (64, 64)},
            {"decay": ManhattanDecay(jnp.ones(12), jnp.ones(12))},
            {"y": shape(batch=1, num_tokens=4096)},
            {"y": shape(num_tokens=4096), "devices": 64},
        ):
            assert not choice.mixes_heads(**(good | changes)), changes
    for other in ("A100", "v5e"):
        with on(other):
            assert not choice.mixes_heads(**good)
