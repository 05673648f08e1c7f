"""The public operator: checks, prefix, choice of form."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lasad_jax.ops import manhattan, recurrence
from lasad_jax.ops.decays import Decay, Grid, ManhattanDecay
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.recurrence import fused_recurrence
from lasad_jax.ops.numerics import accumulator, einsum
from lasad_jax.ops.quadratic import quadratic
from lasad_jax.ops.state import State, init_state

IMPLEMENTATIONS = ("auto", "quadratic", "scan", "chunked", *choice.KERNELS)

# Where no fused kernel runs: the longest sequence for which writing out (N, N) weights beats
# the chunked form, for the decays with one memory and for a memory per column:
# `benchmarks.operator` on two CPU cores and on an H100. TPU is unmeasured, follows the GPU.
_QUADRATIC_UP_TO = {"cpu": (128, 256), "gpu": (128, 1024), "tpu": (128, 1024)}
_CHUNK = 64
_SCAN_CHUNK = 16


def linear_attention(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    decay: Decay,
    *,
    grid: Grid,
    num_prefix: int = 1,
    log_gate: Float[Array, "B N H"] | None = None,
    implementation: str = "auto",
    initial_state: State | None = None,
    return_state: bool = False,
) -> Float[Array, "B N H Dv"] | tuple[Float[Array, "B N H Dv"], State]:
    """o_t = sum over s <= t of D(t, s) (q_t . k_s) v_s, at a cost linear in N.

    Args:
      q, k, v: tokens in raster order after `num_prefix` prefix tokens; with
        `initial_state` the tokens that follow those already seen. Any float type; states
        and decays are float32 (float64 for float64 inputs).
      decay: `NoDecay`, `SequenceDecay`, `RasterDecay` or `ManhattanDecay`.
      grid: (R, C), N <= num_prefix + R * C. A partial image is allowed.
      num_prefix: tokens before the grid. They never decay.
      log_gate: optional content gate, a non-positive addition to the log-decay of each
        step (ignored on prefix tokens). Not for `ManhattanDecay`.
      implementation: one of `IMPLEMENTATIONS`. "quadratic", "scan" and "chunked" run
        anywhere; "mosaic_gpu", "triton" and "mosaic_tpu" are fused kernels. "auto" takes
        the fused kernels that suit the device (that of the mesh, if one is set) and the
        arguments; failing these it writes out the weights of short sequences and is
        chunked beyond.
      initial_state: where an earlier call stopped.
      return_state: also return the state after the last token.

    Returns:
      o in v's dtype, and the state if asked for.

    Raises:
      ValueError: naming the argument that does not fit and what would, or why the named
        implementation cannot run.
    """
    _check(q, k, v, decay, grid, num_prefix, log_gate, implementation, initial_state)
    decay = jax.tree.map(lambda rate: rate.astype(accumulator(q.dtype)), decay)
    stateful = return_state or initial_state is not None
    implementation = resolve_implementation(
        implementation,
        q,
        v,
        decay,
        # Kernels that take up a state leave the prefix to it.
        num_prefix=num_prefix if initial_state is None else 0,
        stateful=stateful,
    )
    if implementation == "quadratic":
        return quadratic(q, k, v, decay, grid=grid, num_prefix=num_prefix, log_gate=log_gate)

    fused, exact = implementation in choice.KERNELS, isinstance(decay, ManhattanDecay)
    short = q.shape[1] - num_prefix <= choice.LONGEST_MANHATTAN
    if fused and exact and short and not stateful:
        return choice.manhattan(implementation, grid[1], num_prefix)(q, k, v, decay)
    if fused and not exact and initial_state is None:
        g = _log_factors(decay, jnp.arange(q.shape[1]) - num_prefix, grid, log_gate, q.dtype)
        backend = choice.recurrence(implementation, q, v)
        out, memory = fused_recurrence(
            q, k, v, g, num_prefix=num_prefix, backend=backend, return_memory=return_state
        )
        return (out, _state_after(k, v, num_prefix, memory)) if return_state else out

    batch, num_tokens, num_heads, key_dim = q.shape
    state = initial_state or init_state(
        decay,
        batch=batch,
        num_heads=num_heads,
        key_dim=key_dim,
        value_dim=v.shape[-1],
        grid=grid,
        num_prefix=num_prefix,
        dtype=v.dtype,
    )
    # A plain 0 keeps positions static, so that the common call folds them into constants.
    index = state.index if initial_state is not None else 0
    state, from_prefix = _take_prefix(q, k, v, state, index)
    linear = _column_memory if exact else _one_memory
    out, memory = linear(
        q, k, v, decay, state.memory, index, grid, num_prefix, log_gate, implementation
    )
    out = (out + from_prefix).astype(v.dtype)
    if not return_state:
        return out
    return out, State(state.prefix_k, state.prefix_v, memory, state.index + num_tokens)


def resolve_implementation(
    implementation: str, q: Array, v: Array, decay: Decay, *, num_prefix: int, stateful: bool
) -> str:
    """The implementation that "auto" stands for here; any other name, if it can run.

    Raises:
      ValueError: saying why the named implementation cannot run.
    """
    if implementation in choice.KERNELS:
        obstacle = choice.obstacle(implementation, q, v, decay, num_prefix)
        if obstacle:
            raise ValueError(f"implementation: {implementation!r} cannot run here: {obstacle}")
    if implementation == "quadratic" and stateful:
        raise ValueError("implementation='quadratic' carries no state; use 'chunked' or 'scan'")
    if implementation != "auto":
        return implementation
    kernels = choice.choose(q, v, decay, num_prefix)
    if kernels is not None:
        return kernels
    limits = _QUADRATIC_UP_TO.get(choice.device().platform, _QUADRATIC_UP_TO["gpu"])
    short = q.shape[1] <= limits[isinstance(decay, ManhattanDecay)]
    return "quadratic" if short and not stateful else "chunked"


def _state_after(k: Array, v: Array, num_prefix: int, memory: Array) -> State:
    """The state after tokens that were the first."""
    missing = [(0, 0), (0, max(0, num_prefix - k.shape[1])), (0, 0), (0, 0)]
    prefix_k, prefix_v = (jnp.pad(x[:, :num_prefix], missing) for x in (k, v))
    return State(prefix_k, prefix_v, memory, jnp.asarray(k.shape[1], jnp.int32))


def _take_prefix(
    q: Array, k: Array, v: Array, state: State, index: Int[Array, ""] | int
) -> tuple[State, Float[Array, "B N H Dv"]]:
    """Stores the prefix tokens among these tokens; returns what all tokens read from them."""
    num_tokens, num_prefix = q.shape[1], state.prefix_k.shape[1]
    p = jnp.arange(num_prefix)
    source = jnp.clip(p - index, 0, num_tokens - 1)
    here = ((p >= index) & (p < index + num_tokens))[:, None, None]
    prefix_k = jnp.where(here, k[:, source], state.prefix_k)
    prefix_v = jnp.where(here, v[:, source], state.prefix_v)
    visible = index + jnp.arange(num_tokens)[:, None] >= p
    scores = einsum("bthd,bphd->bhtp", q, prefix_k.astype(q.dtype)) * visible
    out = einsum("bhtp,bphe->bthe", scores.astype(v.dtype), prefix_v.astype(v.dtype))
    return State(prefix_k, prefix_v, state.memory, state.index), out


def _one_memory(q, k, v, decay, memory, index, grid, num_prefix, log_gate, implementation):
    """The decays that are a single recurrence."""
    place = index + jnp.arange(q.shape[1]) - num_prefix
    g = _log_factors(decay, place, grid, log_gate, q.dtype)
    k = jnp.where((place >= 0)[None, :, None, None], k, 0)
    if implementation in choice.KERNELS:
        backend = choice.recurrence(implementation, q, v)
        return fused_recurrence(
            q, k, v, g, memory, num_prefix=0, backend=backend, return_memory=True
        )
    form = {"chunked": recurrence.chunked, "scan": recurrence.scan}[implementation]
    chunk = _CHUNK if implementation == "chunked" else _SCAN_CHUNK
    return form(q, k, v, g, memory, chunk=min(chunk, q.shape[1]))


def _log_factors(
    decay: Decay, place: Int[Array, " N"], grid: Grid, log_gate: Array | None, dtype: jnp.dtype
) -> Float[Array, "one_or_B N one_or_H"]:
    """g of the tokens whose index on the grid is `place`, negative for the prefix."""
    g = decay.step_log_factor(place, grid)[None]
    g = g if log_gate is None else g + log_gate.astype(accumulator(dtype))
    # A step leads from one grid token to the next: none to the first, none among the prefix.
    return jnp.where((place > 0)[None, :, None], g, 0.0)


def _column_memory(q, k, v, decay, memory, index, grid, num_prefix, log_gate, implementation):
    """The exact 2D decay, a matrix for each column."""
    num_tokens, columns = q.shape[1], grid[1]
    if isinstance(index, int):
        # Nothing seen yet: leave the prefix out, so that the image starts a row of its own.
        column, skipped = 0, min(num_prefix, num_tokens)
        q, k, v = (x[:, skipped:] for x in (q, k, v))
    else:
        place = index + jnp.arange(num_tokens) - num_prefix
        column, skipped = place[0] % columns, 0
        k = jnp.where((place >= 0)[None, :, None, None], k, 0)
    on_grid = num_tokens - skipped
    if on_grid == 0:
        return jnp.zeros_like(v, shape=(v.shape[0], num_tokens, *v.shape[2:])), memory
    rows_q, rows_k, rows_v = (manhattan.lay_on_rows(x, column, columns) for x in (q, k, v))
    start = manhattan.memory_at_row(memory, decay, column)
    if implementation == "scan":
        rows = manhattan.scan(rows_q, rows_k, rows_v, decay, start)
    else:
        fused = None
        if implementation in choice.KERNELS:
            fused = choice.manhattan(implementation, columns, num_prefix=0)
        rows = manhattan.chunked(rows_q, rows_k, rows_v, decay, start, fused=fused)
    out = manhattan.take_from_rows(rows, column, on_grid)
    out = jnp.pad(out, [(0, 0), (skipped, 0), (0, 0), (0, 0)])
    return out, manhattan.final_memory(rows_k, rows_v, memory, decay, column, on_grid)


def _check(q, k, v, decay, grid, num_prefix, log_gate, implementation, initial_state):
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q, k: expected equal shapes (B, N, H, Dk), got {q.shape} and {k.shape}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: expected {(*q.shape[:3], 'Dv')} like q {q.shape}, got {v.shape}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r} is not one of {IMPLEMENTATIONS}")
    longest = num_prefix + grid[0] * grid[1]
    if not 1 <= q.shape[1] <= longest:
        raise ValueError(
            f"q: {q.shape[1]} tokens do not fit grid {grid} after num_prefix={num_prefix} "
            f"tokens; pass 1 to {longest} tokens or a larger grid"
        )
    if not isinstance(decay, Decay):
        families = [family.__name__ for family in typing.get_args(Decay)]
        raise ValueError(f"decay: {decay!r} is none of {families}")
    for name, rate in vars(decay).items():
        if rate.shape != (q.shape[2],):
            raise ValueError(
                f"decay.{name}: expected one rate for each of {q.shape[2]} heads, got {rate.shape}"
            )
    if log_gate is not None:
        if isinstance(decay, ManhattanDecay):
            raise ValueError(
                "log_gate: ManhattanDecay takes no content gate; pass log_gate=None "
                "or use RasterDecay"
            )
        if log_gate.shape != q.shape[:3]:
            raise ValueError(f"log_gate: expected {q.shape[:3]}, got {log_gate.shape}")
    if initial_state is not None and initial_state.prefix_k.shape[1] != num_prefix:
        raise ValueError(
            f"num_prefix: {num_prefix}, but initial_state was made for "
            f"{initial_state.prefix_k.shape[1]} prefix tokens"
        )
