"""A mixer's heads from joint projection to gated output, as Pallas-Triton kernels for NVIDIA GPUs.

One launch each way. A program takes a head of an image and walks its chunks one after another
with the state in its registers, as in `recurrence_triton` but transposed: with the longer side
first, Hopper's tensor cores read both operands from shared memory. Queries, keys, values and gates
go from the projection's columns into its products, and gradients from these into the columns. The
first token is the prefix: its k v^T never decays.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from lasad_jax.ops.kernels.mixed_heads_program import NUM_PREFIX, RESET, Columns, Head
from lasad_jax.ops.kernels.triton_math import Instructions
from lasad_jax.ops.kernels.triton_program import Rows, product


def forward(
    y: Float[Array, "B N H W"],
    steps: Float32[Array, "H M L"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "N Dk"] | None,
    *,
    key_dim: int,
    value_dim: int,
    q_scale: float,
    epsilon: float,
    keep_states: bool,
    num_warps: int = 4,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The gated heads h (B, N, H, Dv) in y's dtype and, with `keep_states`, what `backward` takes:
    the heads o before norm and gate, and the transposed state before each chunk (B, H, M, Dv, Dk).

    Args:
      y: joint projection, bf16 or float32; a head's columns are [q Dk | k Dk | v Dv | out_gate Dv]
        and, with a bias, [content gate 1 | padding].
      steps: log-decays of the grid in M chunks of L tokens; 0 up to the first token of the grid.
      bias: of the content gate; None without one.
      table: cosine and sine of each pair; None does not rotate.
      key_dim, value_dim: Dk and Dv.
      q_scale: factor of the queries.
      epsilon: of the norm.
      keep_states: as said.
      num_warps: of a program.
      interpret: run on any platform, slowly.
    """
    columns = Columns(key_dim, value_dim, y.shape[3])
    call = _Call(y, steps, bias, table, columns, interpret)
    tokens = jax.ShapeDtypeStruct((*y.shape[:3], columns.value_dim), y.dtype)
    states = call.per_chunk(columns.value_dim, columns.key_dim, dtype=y.dtype)
    outputs = (tokens, tokens, states) if keep_states else (tokens,)
    kernel = functools.partial(_forward_kernel, q_scale=q_scale, epsilon=epsilon)
    return call("forward", kernel, (), outputs, num_warps)


def backward(
    y: Float[Array, "B N H W"],
    steps: Float32[Array, "H M L"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "N Dk"] | None,
    o: Float[Array, "B N H Dv"],
    states: Float[Array, "B H M Dv Dk"],
    d_h: Float[Array, "B N H Dv"],
    *,
    key_dim: int,
    value_dim: int,
    q_scale: float,
    epsilon: float,
    num_warps: int = 4,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """(d_y, h, d_g, d_gate): the gradient with respect to y, zeros in the padding; the gated heads
    again; and in float32 for each token (B, H, M, L) the gradients with respect to its log-decay
    and, if there is a content gate, to that before its softplus.

    Args:
      o, states: from `forward`.
      d_h: the gradient with respect to h, in y's dtype.

    The other arguments are `forward`'s.
    """
    columns = Columns(key_dim, value_dim, y.shape[3])
    call = _Call(y, steps, bias, table, columns, interpret)
    numbers = [call.per_chunk(steps.shape[2], dtype=jnp.float32)] * (1 if bias is None else 2)
    kernel = functools.partial(_backward_kernel, q_scale=q_scale, epsilon=epsilon)
    return call("backward", kernel, (o, states, d_h), (y, d_h, *numbers), num_warps)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What both launches share: arguments and how programs see them."""

    y: Array
    steps: Array
    bias: Array | None
    table: Array | None
    columns: Columns
    interpret: bool

    def per_chunk(self, *shape: int, dtype) -> jax.ShapeDtypeStruct:
        """An array (B, H, M, ...)."""
        batch, _, heads, _ = self.y.shape
        return jax.ShapeDtypeStruct((batch, heads, self.steps.shape[1], *shape), dtype)

    def __call__(self, name: str, kernel, inputs, outputs, num_warps: int) -> tuple[Array, ...]:
        batch, num_tokens, heads, _ = self.y.shape
        _, num_chunks, length = self.steps.shape
        stop = num_tokens if num_chunks * length != num_tokens else None
        dot = product(self.y.dtype, self.interpret)
        rows = lambda c: Rows(c * length, length, stop, NUM_PREFIX)

        def spec(x):
            if x.shape[:3] == self.y.shape[:3]:
                return pl.BlockSpec((None, num_tokens, None, x.shape[3]), lambda i, h: (i, 0, h, 0))
            return pl.BlockSpec(
                (None, None, *x.shape[2:]), lambda i, h: (i, h, *(0 for _ in x.shape[2:]))
            )

        def body(refs, *others):
            head = Head(self.columns, rows, dot, Instructions(self.interpret), num_chunks, *refs)
            kernel(head, *others)

        arguments = (self.y, self.steps, self.bias, self.table)
        specs = (
            spec(self.y),
            pl.BlockSpec((None, num_chunks, length), lambda i, h: (h, 0, 0)),
            None if self.bias is None else pl.BlockSpec((1,), lambda i, h: (h,)),
            None if self.table is None else pl.BlockSpec(self.table.shape, lambda i, h: (0, 0)),
        )
        return pl.pallas_call(
            body,
            grid=(batch, heads),
            in_specs=(specs, *map(spec, inputs)),
            out_specs=tuple(map(spec, outputs)),
            out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
            interpret=self.interpret,
            name=f"mixed_heads_{name}",
        )(arguments, *inputs)


def _forward_kernel(head, h_ref, o_ref=None, states_ref=None, *, q_scale, epsilon):
    dtype, dot, columns = head.dtype, head.dot, head.columns
    _, _, prefix_k, prefix_v = head.prefix()

    def one_chunk(c, state):
        rows = head.rows(c)
        decay, *_ = head.decay(c, rows)
        turn = head.turn(rows)
        q = (head.active(head.load(rows, "q"), turn) * q_scale).astype(dtype)
        k = head.active(head.load(rows, "k"), turn).astype(dtype)
        v, gate = rows.load(head.y_ref, columns.v), head.load(rows, "out_gate")
        rounded = state.astype(dtype)
        out = decay.from_start() * dot(q, rounded, 1, 1)
        out += dot((dot(q, k, 1, 1) * decay.between()).astype(dtype), v, 1, 0)
        out += jnp.sum(q * prefix_k, 1)[:, None] * prefix_v
        out = out.astype(dtype)
        if states_ref is not None:
            states_ref[c] = rounded
            rows.store(o_ref, out)
        normal, _ = head.normalise(out.astype(jnp.float32), epsilon)
        rows.store(h_ref, normal * head.math.silu(gate))
        return decay.whole() * state + dot((decay.to_end() * v).astype(dtype), k, 0, 0)

    lax.fori_loop(0, head.num_chunks, one_chunk, head.zeros())


def _backward_kernel(
    head, o_ref, states_ref, d_h_ref, d_y_ref, h_ref, d_g_ref, d_gate_ref=None, *, q_scale, epsilon
):
    dtype, dot, columns = head.dtype, head.dot, head.columns
    _, _, prefix_k, prefix_v = head.prefix()

    def through_gate(rows) -> Float[Array, "L Dv"]:
        """The gradient with respect to o; that of the gate and h are written."""
        gate, d_h = head.load(rows, "out_gate"), rows.load(d_h_ref).astype(jnp.float32)
        normal, factor = head.normalise(rows.load(o_ref).astype(jnp.float32), epsilon)
        silu = head.math.silu(gate)
        rows.store(h_ref, normal * silu)
        rows.store(d_y_ref, d_h * normal * head.math.silu_slope(gate), columns.out_gate)
        d_normal = d_h * silu
        return factor * (d_normal - normal * head.mean(normal * d_normal))

    def one_chunk(i, carry):
        d_state, d_prefix = carry
        c = head.num_chunks - 1 - i
        rows = head.rows(c)
        decay, g, slope = head.decay(c, rows)
        d_o, turn = through_gate(rows).astype(dtype), head.turn(rows)
        state, d_rounded = states_ref[c], d_state.astype(dtype)
        q_columns, k_columns = head.load(rows, "q"), head.load(rows, "k")
        q = (head.active(q_columns, turn) * q_scale).astype(dtype)
        k = head.active(k_columns, turn).astype(dtype)
        v = rows.load(head.y_ref, columns.v)

        through = decay.whole() * jnp.sum(jnp.sum(state * d_state, 1), 0)
        d_state = decay.whole() * d_state
        d_state += dot((decay.from_start() * d_o).astype(dtype), q, 0, 0)
        d_prefix += dot(d_o, q, 0, 0)
        d_scores = (dot(d_o, v, 1, 1) * decay.between()).astype(dtype)
        dq = decay.from_start() * dot(d_o, state, 1, 0)
        dq += dot(d_scores, k, 1, 0)
        gain = jnp.sum(q * dq, 1)
        dq += jnp.sum(d_o * prefix_v, 1)[:, None] * prefix_k
        rows.store(d_y_ref, head.d_active(dq * q_scale, q_columns, turn), columns.q)

        # Computed anew, not transposed: as in `recurrence_triton`.
        turned = decay.between(transposed=True)
        scores = (dot(k, q, 1, 1) * turned).astype(dtype)
        dv = decay.to_end() * dot(k, d_rounded, 1, 1)
        dv += dot(scores, d_o, 1, 0)
        rows.store(d_y_ref, dv, columns.v, prefix=False)
        d_scores = (dot(v, d_o, 1, 1) * turned).astype(dtype)
        within = dot(d_scores, q, 1, 0)
        across = decay.to_end() * dot(v, d_rounded, 1, 0)
        d_k = head.d_active(within + across, k_columns, turn)
        rows.store(d_y_ref, d_k, columns.k, prefix=False)

        # As in `recurrence_triton`.
        gain, loss = gain - jnp.sum(k * within, 1), jnp.sum(k * across, 1)
        change = loss - gain
        d_g = (jnp.sum(gain, 0) + through) + (jnp.cumsum(change) - change)
        d_g_ref[c] = jnp.where(g > RESET, d_g, 0.0)
        if d_gate_ref is not None:
            d_gate_ref[c] = d_g * slope
            rest = jnp.arange(columns.rest.size)[None] == 0
            rows.store(d_y_ref, jnp.where(rest, (d_g * slope)[:, None], 0.0), columns.rest)
        return d_state, d_prefix

    carry = head.zeros(), head.zeros()
    _, d_prefix = lax.fori_loop(0, head.num_chunks, one_chunk, carry)
    prefix_turn, prefix_x, prefix_k, prefix_v = head.prefix()
    d_k = jnp.sum(d_prefix * jnp.sum(prefix_v, 0)[:, None], axis=0)[None]
    d_v = jnp.sum(d_prefix * prefix_k, axis=1)[None]
    d_k = head.d_active(d_k, prefix_x, prefix_turn)
    for x, where in ((d_k, columns.k), (d_v, columns.v)):
        d_y_ref[pl.ds(0, 1), where] = x.astype(dtype)
