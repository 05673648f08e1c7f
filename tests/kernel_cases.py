"""Cases, runs and a float64 oracle of the fused kernels, and devices that are not at hand."""

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lasad_jax.ops.kernels.choice import recurrence
from lasad_jax.ops.kernels.recurrence import Backend, fused_recurrence

# Interpreted kernels are large programs that run for an instant: compile them fast instead.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# With XLA's default way to emit fused loops, in place of the quicker one of the tests.
precise_jit = functools.partial(jax.jit, compiler_options={"xla_backend_extra_options": ""})
NAMES = ("q", "k", "v", "g", "memory")
TOLERANCES = {jnp.float32: {}, jnp.bfloat16: {"g": 5e-3}}
DEFAULT_TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 3e-3}

# Cases


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the single recurrence.

    Attributes:
      num_tokens, num_prefix, batch, heads, widths: N, P, B, H and (Dk, Dv).
      gate: g of the grid tokens. A number is that of all; "mixed" are small ones, zeros and
        some of -50; "resets" has some of -256 instead.
      shared: one g for all images.
      memory, end: whether a state comes in, whether one goes out.
    """

    num_tokens: int
    num_prefix: int = 1
    gate: str | float = "mixed"
    batch: int = 2
    heads: int = 2
    widths: tuple[int, int] = (16, 16)
    shared: bool = False
    memory: bool = False
    end: bool = False


@functools.cache
def inputs(case: Case):
    """(q, k, v, g, memory) and (d_out, d_end) in float64, absent states as None.

    Tokens are representable in bf16 and the rest in float32, so that only kernels round.
    """
    rng = np.random.default_rng(0)
    in_bf16 = lambda *shape: np.float64(rng.standard_normal(shape).astype(jnp.bfloat16))
    lead, (key_dim, value_dim) = (case.batch, case.num_tokens, case.heads), case.widths
    q, k = in_bf16(2, *lead, key_dim) * np.array([1 / 4, 1])[:, None, None, None, None]
    v, d_out = in_bf16(2, *lead, value_dim)
    g = -rng.exponential(0.2, (1 if case.shared else case.batch, *lead[1:]))
    g *= rng.integers(0, 2, g.shape)
    if case.gate == "mixed":
        g[rng.random(g.shape) < 0.02] = -50
    elif case.gate == "resets":
        g[rng.random(g.shape) < 0.1] = -256
    else:
        g[:] = case.gate
    g[:, : case.num_prefix] = 0
    states = rng.standard_normal((2, case.batch, case.heads, key_dim, value_dim), np.float32)
    memory, d_end = np.float64(states)
    args = (q, k, v, np.float64(np.float32(g)), memory if case.memory else None)
    return args, (d_out, d_end if case.end else None)


def cast(args, cotangents, dtype):
    """What `inputs` returns, as kernels for `dtype` take it."""
    (q, k, v, *float32), (d_out, d_end) = args, cotangents
    to = lambda dtype: functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    q, k, v, d_out = to(dtype)((q, k, v, d_out))
    return (q, k, v, *to(jnp.float32)(float32)), (d_out, to(jnp.float32)(d_end))


# The oracle


def padded(x: np.ndarray) -> np.ndarray:
    """Tokens (B, N, ...) with zeros behind, which change no other's results, to share programs."""
    return np.pad(x, [(0, 0), (0, -x.shape[1] % 128)] + [(0, 0)] * (x.ndim - 2))


@functools.cache
def oracle(case: Case) -> dict[str, np.ndarray]:
    """Output, final state and all gradients by name, in float64."""
    (q, k, v, g, memory), (d_out, d_end) = inputs(case)
    nothing = np.zeros((case.batch, case.heads, *case.widths))
    g = np.broadcast_to(g, q.shape[:3])
    args = (*map(padded, (q, k, v, g)), nothing if memory is None else memory)
    cotangents = padded(d_out), nothing if d_end is None else d_end
    with jax.enable_x64(True):
        results = jax.tree.map(np.asarray, _oracle(args, cotangents, case.num_prefix))
    for name in ("out", *NAMES[:4]):
        results[name] = results[name][:, : case.num_tokens]
    if case.shared:
        results["g"] = np.sum(results["g"], axis=0, keepdims=True)
    absent = {"memory": memory is None, "end": d_end is None}
    return {name: x for name, x in results.items() if not absent.get(name)}


@quick_jit
def _oracle(args, cotangents, num_prefix):
    (out, end), pullback = jax.vjp(lambda *args: _by_pairs(*args, num_prefix), *args)
    return {"out": out, "end": end, **dict(zip(NAMES, pullback(cotangents), strict=True))}


def _by_pairs(q, k, v, g, memory, num_prefix):
    """The weight of every pair of tokens, written out."""
    t = jnp.arange(q.shape[1])
    since = jnp.cumsum(g, axis=1)
    causal = (t[:, None] >= t)[..., None]
    weights = jnp.where(causal, since[:, :, None] - since[:, None], -jnp.inf)
    on_grid = (t >= num_prefix)[:, None]
    weights = jnp.where(on_grid, jnp.exp(weights), causal)
    out = jnp.einsum("bthd,bshd,btsh,bshe->bthe", q, k, weights, v)
    out += jnp.einsum("bthd,bth,bhde->bthe", q, jnp.exp(since), memory)
    to_end = jnp.where(on_grid, jnp.exp(since[:, -1:] - since), 0.0)
    end = jnp.exp(since[:, -1])[..., None, None] * memory
    return out, end + jnp.einsum("bsh,bshd,bshe->bhde", to_end, k, v)


# The kernels


@functools.cache
def interpreted(name: str, dtype, widths=(16, 16), *, segments=1, chunk=None) -> Backend:
    """A backend that runs on the CPU; the same object for the same arguments."""
    q, v = (jax.ShapeDtypeStruct((1, 64, 1, width), dtype) for width in widths)
    backend = recurrence(name, q, v, interpret=True)
    chunk = chunk or backend.chunk
    return dataclasses.replace(backend, chunk=chunk, segments=lambda programs, chunks: segments)


def run(case: Case, backend: Backend, dtype) -> dict[str, jax.Array]:
    """The results of the kernels, named as the oracle's."""
    args, cotangents = cast(*inputs(case), dtype)
    options = {"num_prefix": case.num_prefix, "return_memory": case.end, "backend": backend}
    return run_arrays(args, cotangents, **options)


def with_gradients(args, cotangents, **options):
    """Output, final state and gradients of the fused call, without what is absent."""
    (out, end), pullback = jax.vjp(functools.partial(fused_recurrence, **options), *args)
    results = {"out": out, "end": end, **dict(zip(NAMES, pullback(cotangents), strict=True))}
    return {name: x for name, x in results.items() if x is not None}


run_arrays = quick_jit(with_gradients, static_argnames=("num_prefix", "return_memory", "backend"))


def assert_close(got: dict[str, jax.Array], case: Case, dtype):
    """Every result is near the oracle's, in norm; NaN anywhere is far."""
    want = oracle(case)
    assert got.keys() == want.keys()
    for name in want:
        x, y = np.asarray(got[name], np.float64), want[name]
        assert x.shape == y.shape, name
        difference, scale = np.linalg.norm(x - y), np.linalg.norm(y)
        tolerance = TOLERANCES[dtype].get(name, DEFAULT_TOLERANCE[dtype])
        # What float32 cannot hold may be 0.
        allowed = tolerance * scale + 1e-30
        if name == "g":
            # dg sums q . dq - k . dk. Under strong decay these cancel down to 1e-22, and the
            # rounding of the terms in float32 remains.
            allowed += 1e-6 * np.linalg.norm(np.sum(inputs(case)[0][0] * want["q"], axis=-1))
        assert difference <= allowed, f"{name}: {difference:.1e} of {scale:.1e} > {allowed:.1e}"


# Devices

_KINDS = {
    "H200": ("NVIDIA H200", "gpu"),
    "A100": ("NVIDIA A100-SXM4-80GB", "gpu"),
    "v5e": ("TPU v5 lite", "tpu"),
    "v6e": ("TPU v6 lite", "tpu"),
}


def on(name: str):
    """A context in which programs are made for a device, there or not."""
    kind, platform = _KINDS[name]
    device = jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lower(name: str, function, *args) -> str:
    """The program of `function` for a device."""
    platform = {"gpu": "cuda", "tpu": "tpu"}[_KINDS[name][1]]
    with on(name):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


# Programs


def live_calls(lowered: jax.stages.Lowered) -> Iterator[tuple[str, str, int]]:
    """Kernels of a program: target, name and number of outputs of each.

    Without those whose results nobody reads, such as what rematerialisation would make of
    results that are kept: XLA removes them first of all.
    """
    module = lowered.compiler_ir("stablehlo")
    functions = {function.attributes["sym_name"].value: function for function in module.body}
    return _live(functions["main"].operation, functions)


def _live(op, functions):
    for block in (block for region in op.regions for block in region):
        for inner in reversed(list(block.operations)):
            inner = inner.operation
            pure = inner.name.startswith("stablehlo.") or inner.name == "func.call"
            if pure and inner.results and not any(list(x.uses) for x in inner.results):
                inner.erase()
                continue
            if inner.name == "stablehlo.custom_call":
                yield _described(inner)
            if inner.name == "func.call":
                yield from _live(functions[inner.attributes["callee"].value].operation, functions)
            yield from _live(inner, functions)


def _described(call):
    # Mosaic TPU's name stands with the other attributes, Triton's among its options, and Mosaic
    # GPU's in the compiled module itself.
    options, key, name = call.attributes, "kernel_name", ""
    if "mhlo.backend_config" in options:
        options, key = options["mhlo.backend_config"], "name"
    if key in options:
        name = options[key].value
    elif "module" in options:
        symbol = rb"\b(?!stable_)(\w+)_mosaic_gpu\0"
        name = re.search(symbol, options["module"].value_bytes)[1].decode()
    return call.attributes["call_target_name"].value, name, len(call.results)
