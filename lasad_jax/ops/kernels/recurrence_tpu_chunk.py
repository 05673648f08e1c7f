"""The bodies of the TPU recurrence: one program with one chunk (see `recurrence_tpu`)."""

import functools
import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.tpu_tiles import (
    COLUMNS_BY_COLUMNS,
    ROWS_BY_ROWS,
    SUBLANES,
    Pack,
    Packing,
    dot,
    index,
    keep_rows,
    lower_triangle,
    round_up,
)


class Sizes(typing.NamedTuple):
    """The static numbers of a call."""

    num_tokens: int
    num_prefix: int
    num_heads: int
    packing: Packing
    key_dim: int
    value_dim: int
    num_chunks: int
    chunk: int

    @classmethod
    def of(cls, q, v, b, num_prefix, segments):
        """Checks and collects them."""
        num_tokens, num_heads, key_dim = q.shape[1:]
        num_chunks, chunk = b.shape[2], b.shape[4]
        if segments != 1:
            raise ValueError(f"segments: {segments}, but a TPU core is never split; pass 1")
        if chunk % SUBLANES or num_chunks != -(-num_tokens // chunk):
            raise ValueError(
                f"b: {num_chunks} chunks of {chunk} rows; pass chunks of a multiple of "
                f"{SUBLANES} rows, as many as {num_tokens} tokens (prefix included) fill"
            )
        if num_prefix > chunk:
            raise ValueError(f"num_prefix: {num_prefix} does not fit the first {chunk} rows")
        packing = Packing.of(num_heads, key_dim, v.shape[-1])
        return cls(
            num_tokens, num_prefix, num_heads, packing, key_dim, v.shape[-1], num_chunks, chunk
        )

    @property
    def packed_state(self) -> tuple[int, int, int]:
        """One program's states, a block-diagonal matrix for each pack."""
        pack = self.packing.pack
        return self.packing.num_packs, pack * self.key_dim, pack * self.value_dim

    def for_chunk(self, c, body):
        """Runs body(rows) for chunk c, compiled apart for a first and last chunk unlike others."""
        last = self.num_chunks - 1
        existing = self.num_tokens - last * self.chunk
        ordinary = Rows(self.chunk, 0, self.chunk)
        ends = {0: Rows(self.chunk, self.num_prefix, self.chunk)}
        # A chunk that is first and last at once is both.
        ends[last] = Rows(round_up(existing), 0 if last else self.num_prefix, existing)
        ends = {i: rows for i, rows in ends.items() if rows != ordinary}
        for i, rows in ends.items():
            pl.when(c == i)(functools.partial(body, rows))
        if len(ends) < self.num_chunks:
            elsewhere = functools.reduce(jnp.logical_and, [c != i for i in ends], c >= 0)
            pl.when(elsewhere)(functools.partial(body, ordinary))


class Rows(typing.NamedTuple):
    """The rows of a chunk: `computed` in all, the first `prefix` of them outside the grid."""

    computed: int
    prefix: int
    existing: int

    def live(self, x):
        """x with zeros in rows past the last token."""
        return keep_rows(x, 0, self.existing)

    def on_grid(self, x):
        """x with zeros in the prefix rows and past the last token."""
        return keep_rows(x, self.prefix, self.existing)


class _Decays(typing.NamedTuple):
    """Factors for each head of a pack, lists of float32."""

    pairs: list[Float[Array, "n n"]]  # exp(b_t - b_s), 0 where t < s
    since_start: list[Float[Array, "n 1"]]  # exp(b_t)
    to_end: list[Float[Array, "n 1"]]  # exp(b_end - b_t)
    whole: list[Float[Array, "1 1"]]  # exp(b_end)


def _decays(b: Float[Array, "heads K n"], causal) -> _Decays:
    heads, parts, n = b.shape
    split = [b[:, j] for j in range(parts)]
    ends = [x[:, n - 1 :] for x in split]
    to_end = sum(end - x for end, x in zip(ends, split, strict=True))
    # Rows of lanes become columns all at once, exponentials taken while they are rows.
    columns = jnp.concatenate([jnp.exp(sum(split)), jnp.exp(to_end), *split]).T
    whole = jnp.exp(sum(ends))

    def column(i, head):
        return columns[:, i * heads + head : i * heads + head + 1]

    def pairs(head):
        differences = sum(column(2 + j, head) - split[j][head : head + 1] for j in range(parts))
        return jnp.exp(jnp.where(causal, differences, -jnp.inf))

    each = range(heads)
    return _Decays(
        [pairs(head) for head in each],
        [column(0, head) for head in each],
        [column(1, head) for head in each],
        [whole[head : head + 1] for head in each],
    )


def _prefix(ref, pack: Pack, width: int, num_prefix: int):
    """Prefix keys or values, stacked head below head, each zero in the others' lanes."""
    return jnp.concatenate(pack.split(keep_rows(ref[:, pack.lanes(width)], 0, num_prefix)))


def _read_prefix(x, prefix, pack, rows):
    """x_t . prefix_p for the heads side by side, zero where p > t."""
    scores = dot(x, prefix, ROWS_BY_ROWS)
    if rows.prefix:
        p = lax.rem(index(scores.shape, 1), scores.shape[1] // pack.heads)
        scores = jnp.where(index(scores.shape, 0) >= p, scores, 0.0)
    return scores.astype(x.dtype)


def _set_states(sizes, ref, given):
    """Packs given states (heads, Dk, Dv), or zeros."""
    ref[...] = jnp.zeros_like(ref)
    if given is not None:
        for head in range(sizes.packing.heads):
            pack, i = divmod(head, sizes.packing.pack)
            ref[(pack, *_block(sizes, i))] = given[head]


def _get_states(sizes, ref, out):
    for head in range(sizes.packing.heads):
        pack, i = divmod(head, sizes.packing.pack)
        out[head] = ref[(pack, *_block(sizes, i))]


def _block(sizes, i):
    return pl.ds(i * sizes.key_dim, sizes.key_dim), pl.ds(i * sizes.value_dim, sizes.value_dim)


def forward_kernel(sizes, refs):
    """One chunk's outputs, the state carried on."""
    c = pl.program_id(2)
    pl.when(c == 0)(lambda: _set_states(sizes, refs["state"], refs.get("starts")))

    def chunk(rows):
        causal = lower_triangle(rows.computed)
        sizes.packing.for_each(functools.partial(_forward_pack, sizes, refs, rows, causal))

    sizes.for_chunk(c, chunk)
    if "ends" in refs:
        last = c == sizes.num_chunks - 1
        pl.when(last)(lambda: _get_states(sizes, refs["state"], refs["ends"]))


def _forward_pack(sizes, refs, rows, causal, pack):
    n, dtype = rows.computed, refs["q"].dtype
    keys, values = pack.lanes(sizes.key_dim), pack.lanes(sizes.value_dim)
    square = pack.index, pl.ds(0, keys.size), pl.ds(0, values.size)
    q, k = refs["q"][:n, keys], rows.on_grid(refs["k"][:n, keys])
    v = rows.on_grid(refs["v"][:n, values])
    decays = _decays(refs["b"][pl.ds(pack.first, pack.heads), :, :n], causal)
    state = refs["state"][square]
    if "states" in refs:
        refs["states"][:, values] = pack.compact(state).astype(dtype)

    o = pack.spread(decays.since_start, sizes.value_dim) * dot(q, state.astype(dtype))
    for own_q, own_v, pairs in zip(pack.split(q), pack.split(v), decays.pairs, strict=True):
        scores = dot(own_q, k, ROWS_BY_ROWS) * pairs
        o += dot(scores.astype(dtype), own_v)
    if sizes.num_prefix:
        prefix_k = _prefix(refs["prefix_k"], pack, sizes.key_dim, sizes.num_prefix)
        prefix_v = _prefix(refs["prefix_v"], pack, sizes.value_dim, sizes.num_prefix)
        o += dot(_read_prefix(q, prefix_k, pack, rows), prefix_v)
    refs["o"][:n, values] = o.astype(dtype)
    decayed_v = (v * pack.spread(decays.to_end, sizes.value_dim)).astype(dtype)
    whole = pack.spread(decays.whole, sizes.value_dim)
    refs["state"][square] = whole * state + pack.diagonal(dot(k, decayed_v, COLUMNS_BY_COLUMNS))


def backward_kernel(sizes, refs):
    """One chunk's gradients, the state's gradient carried back."""
    step = pl.program_id(2)
    c = sizes.num_chunks - 1 - step

    @pl.when(step == 0)
    def _():
        _set_states(sizes, refs["d_state"], refs.get("d_ends"))
        for name in ("d_prefix_k", "d_prefix_v"):
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    def chunk(rows):
        causal = lower_triangle(rows.computed)
        sizes.packing.for_each(functools.partial(_backward_pack, sizes, refs, rows, causal))

    sizes.for_chunk(c, chunk)
    if "d_starts" in refs:
        pl.when(c == 0)(lambda: _get_states(sizes, refs["d_state"], refs["d_starts"]))


def _backward_pack(sizes, refs, rows, causal, pack):
    n, dtype = rows.computed, refs["q"].dtype
    keys, values = pack.lanes(sizes.key_dim), pack.lanes(sizes.value_dim)
    square = pack.index, pl.ds(0, keys.size), pl.ds(0, values.size)
    q, d_o = rows.live(refs["q"][:n, keys]), rows.live(refs["d_o"][:n, values])
    k, v = rows.on_grid(refs["k"][:n, keys]), rows.on_grid(refs["v"][:n, values])
    decays = _decays(refs["b"][pl.ds(pack.first, pack.heads), :, :n], causal)
    since_start, to_end = (
        [pack.spread(x, width) for width in (sizes.key_dim, sizes.value_dim)]
        for x in (decays.since_start, decays.to_end)
    )
    state, d_state = pack.expand(refs["states"][:, values]), refs["d_state"][square]
    rounded = d_state.astype(dtype)

    dq = since_start[0] * dot(d_o, state, ROWS_BY_ROWS)
    dk_later = to_end[0] * dot(v, rounded, ROWS_BY_ROWS)
    dv = to_end[1] * dot(k, rounded)
    dk_within = 0.0
    for own_q, own_k, own_d_o, pairs in zip(
        pack.split(q), pack.split(k), pack.split(d_o), decays.pairs, strict=True
    ):
        scores = (dot(own_q, k, ROWS_BY_ROWS) * pairs).astype(dtype)
        d_scores = (dot(own_d_o, v, ROWS_BY_ROWS) * pairs).astype(dtype)
        dq += dot(d_scores, own_k)
        dk_within += dot(d_scores, own_q, COLUMNS_BY_COLUMNS)
        dv += dot(scores, own_d_o, COLUMNS_BY_COLUMNS)

    # The factor of step u scales every pair that spans it: pairs within the chunk are those
    # of rows t >= u less those of columns s >= u; then keys s < u read after the chunk; then
    # all that was there before the chunk and is read after it.
    within, later = q * dq - k * dk_within, k * dk_later
    through = jnp.sum(state * d_state, 0, keepdims=True)
    for head in range(pack.heads):
        own_within, own_later, own_through = (
            jnp.sum(pack.only(head, x), 1, keepdims=True) for x in (within, later, through)
        )
        spanning = jnp.sum(jnp.where(causal, own_within, own_later), 0, keepdims=True)
        refs["dg"][pack.first + head, :, :n] = spanning + decays.whole[head] * own_through
    decayed_d_o = (since_start[1] * d_o).astype(dtype)
    whole = pack.spread(decays.whole, sizes.value_dim)
    update = pack.diagonal(dot(q, decayed_d_o, COLUMNS_BY_COLUMNS))
    refs["d_state"][square] = whole * d_state + update

    dk = dk_within + dk_later
    if sizes.num_prefix:
        prefix_k = _prefix(refs["prefix_k"], pack, sizes.key_dim, sizes.num_prefix)
        prefix_v = _prefix(refs["prefix_v"], pack, sizes.value_dim, sizes.num_prefix)
        reads = _read_prefix(q, prefix_k, pack, rows)
        d_reads = _read_prefix(d_o, prefix_v, pack, rows)
        dq += dot(d_reads, prefix_k)
        refs["d_prefix_k"][:, keys] += _own_blocks(dot(d_reads, q, COLUMNS_BY_COLUMNS), pack)
        refs["d_prefix_v"][:, values] += _own_blocks(dot(reads, d_o, COLUMNS_BY_COLUMNS), pack)
        # The first chunk comes last. The recurrence has left zeros in its prefix rows.
        if rows.prefix:
            dk = _add_first_rows(dk, refs["d_prefix_k"][:, keys])
            dv = _add_first_rows(dv, refs["d_prefix_v"][:, values])
    refs["dq"][:n, keys] = dq.astype(dtype)
    refs["dk"][:n, keys] = dk.astype(dtype)
    refs["dv"][:n, values] = dv.astype(dtype)


def _own_blocks(x, pack):
    """(heads * rows, lanes) to (rows, lanes), from each head's rows its own lanes."""
    return pack.compact(pack.diagonal(x))


def _add_first_rows(x, first):
    rows = first.shape[0]
    return jnp.concatenate([x[:rows] + first, x[rows:]]) if rows < x.shape[0] else x + first
