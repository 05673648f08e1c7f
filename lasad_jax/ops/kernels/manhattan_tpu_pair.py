"""The bodies of the TPU kernels of the 2D decay: one pair of tiles (see `manhattan_tpu`)."""

import functools
import typing

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.tpu_tiles import (
    COLUMNS_BY_COLUMNS,
    LANES,
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

# Of the sixteen megabytes of VMEM that kernels get, what dq in float32 may take.
_DQ_BYTES = 2**23


class Sizes(typing.NamedTuple):
    """The static numbers of a call."""

    num_tokens: int
    num_prefix: int
    columns: int
    num_heads: int
    packing: Packing
    key_dim: int
    value_dim: int
    num_tiles: int
    tile: int

    @classmethod
    def of(cls, q, v, columns, num_prefix, tile):
        """Collects them."""
        if tile % SUBLANES:
            raise ValueError(f"tile: {tile} is not a multiple of {SUBLANES}")
        num_tokens, num_heads, key_dim = q.shape[1:]
        num_tiles = -(-num_tokens // tile)
        lanes = max(LANES, min(4 * LANES, _DQ_BYTES // (4 * tile * num_tiles)))
        packing = Packing.of(num_heads, key_dim, v.shape[-1], lanes=lanes)
        return cls(
            num_tokens,
            num_prefix,
            columns,
            num_heads,
            packing,
            key_dim,
            v.shape[-1],
            num_tiles,
            tile,
        )

    def grid(self, q, order):
        """Samples, programs of heads, pairs of tiles."""
        return q.shape[0], self.num_heads // self.packing.heads, len(order)

    def blocks(self):
        """Blocks of the query tile and of the key tile of each pair; dq goes by the latter."""
        heads = self.packing.heads

        def rows(width, which):
            shape = (None, self.tile, heads * width)
            return pl.BlockSpec(shape, lambda n, h, p, pairs, *_: (n, pairs[which, p], h))

        return {
            "q": rows(self.key_dim, 0),
            **dict.fromkeys(("d_o", "o"), rows(self.value_dim, 0)),
            **dict.fromkeys(("k", "dq", "dk"), rows(self.key_dim, 1)),
            **dict.fromkeys(("v", "dv"), rows(self.value_dim, 1)),
            "d_rates": pl.BlockSpec((None, heads, 2, self.tile), lambda n, h, *_: (n, h, 0, 0)),
        }

    def for_pair(self, t, s, body):
        """Runs body(pair) for query tile t and key tile s, compiled apart for each kind."""
        last = self.num_tiles - 1
        rest = self.num_tokens - last * self.tile
        whole, diagonal = t < last, t == s
        kinds = [
            (whole & diagonal, _Pair(self.tile, self.tile, True)),
            (whole & ~diagonal, _Pair(self.tile, self.tile, False)),
            (~whole & diagonal, _Pair(rest, rest, True)),
            (~whole & ~diagonal, _Pair(rest, self.tile, False)),
        ]
        if rest == self.tile:
            kinds = [(diagonal, kinds[0][1]), (~diagonal, kinds[1][1])]
        for condition, pair in kinds[2:] if last == 0 else kinds:
            pl.when(condition)(functools.partial(body, pair))


class _Pair(typing.NamedTuple):
    """A query tile of `queries` tokens, a key tile of `keys`; `diagonal` if they are the same."""

    queries: int
    keys: int
    diagonal: bool

    def load_queries(self, ref, lanes):
        return keep_rows(ref[: round_up(self.queries), lanes], 0, self.queries)

    def load_keys(self, ref, lanes):
        return keep_rows(ref[: round_up(self.keys), lanes], 0, self.keys)


class _Step(typing.NamedTuple):
    """A program's place: its first head, step p with query tile t and key tile s."""

    head: Array
    p: Array
    t: Array
    s: Array

    @classmethod
    def of(cls, sizes, refs):
        p, pairs = pl.program_id(2), refs["pairs"]
        return cls(pl.program_id(1) * sizes.packing.heads, p, pairs[0, p], pairs[1, p])


class _Distances(typing.NamedTuple):
    """Rows and columns between every query and key, 0 for prefix keys; None: all see all."""

    rows: Float[Array, "n m"]
    columns: Float[Array, "n m"]
    causal: Array | None

    @classmethod
    def of(cls, sizes, pair, step):
        n, m = round_up(pair.queries), round_up(pair.keys)
        first_query, first_key = (x * sizes.tile - sizes.num_prefix for x in (step.t, step.s))
        query_row, query_column = _place(first_query + index((n, 1), 0), sizes.columns)
        key = first_key + index((1, m), 1)
        key_row, key_column = _place(key, sizes.columns)
        rows, columns = query_row - key_row, jnp.abs(query_column - key_column)
        if sizes.num_prefix:
            rows, columns = (jnp.where(key < 0, 0.0, x) for x in (rows, columns))
        return cls(rows, columns, lower_triangle(n) if pair.diagonal else None)

    def weights(self, row_rate, column_rate):
        log_weights = -(row_rate * self.rows + column_rate * self.columns)
        if self.causal is not None:
            log_weights = jnp.where(self.causal, log_weights, -jnp.inf)
        return jnp.exp(log_weights)


def _place(token, columns):
    """Row and column of grid tokens, by float arithmetic: TPUs divide no integers."""
    token = token.astype(jnp.float32)
    row = jnp.floor((token + 0.5) * (1.0 / columns))
    return row, token - row * columns


def forward_kernel(sizes, refs):
    """One pair's part of the outputs of its queries."""
    step = _Step.of(sizes, refs)

    @pl.when(step.s == 0)
    def _():
        refs["o_sum"][...] = jnp.zeros_like(refs["o_sum"])

    def pair(pair):
        distances = _Distances.of(sizes, pair, step)
        sizes.packing.for_each(functools.partial(_forward_pack, sizes, refs, pair, step, distances))

    sizes.for_pair(step.t, step.s, pair)


def _weights(refs, step, distances, pack: Pack):
    """The weights of each head of a pack."""
    for head in range(pack.heads):
        h = step.head + pack.first + head
        rates = (refs[name][h] for name in ("row_rate", "column_rate"))
        yield distances.weights(*rates)


def _forward_pack(sizes, refs, pair, step, distances, pack):
    keys, values, dtype = pack.lanes(sizes.key_dim), pack.lanes(sizes.value_dim), refs["q"].dtype
    q = pair.load_queries(refs["q"], keys)
    k, v = pair.load_keys(refs["k"], keys), pair.load_keys(refs["v"], values)
    n = q.shape[0]
    o = refs["o_sum"][:n, values]
    all_weights = _weights(refs, step, distances, pack)
    for own_q, own_v, weights in zip(pack.split(q), pack.split(v), all_weights, strict=True):
        scores = dot(own_q, k, ROWS_BY_ROWS) * weights
        o += dot(scores.astype(dtype), own_v)
    if pair.diagonal:
        refs["o"][:n, values] = o.astype(dtype)
    else:
        refs["o_sum"][:n, values] = o


def backward_kernel(sizes, refs):
    """One pair's part of all gradients."""
    step = _Step.of(sizes, refs)

    @pl.when(step.p == 0)
    def _():
        for name in ("dq_sum", "d_rates"):
            refs[name][...] = jnp.zeros_like(refs[name])

    @pl.when(step.t == step.s)
    def _():
        for name in ("dk_sum", "dv_sum"):
            refs[name][...] = jnp.zeros_like(refs[name])

    def pair(pair):
        distances = _Distances.of(sizes, pair, step)
        sizes.packing.for_each(
            functools.partial(_backward_pack, sizes, refs, pair, step, distances)
        )
        # Key tiles up to s = t were all that a query of tile t sees.
        if pair.diagonal:
            refs["dq"][...] = refs["dq_sum"][step.t].astype(refs["dq"].dtype)

    sizes.for_pair(step.t, step.s, pair)

    @pl.when(step.t == sizes.num_tiles - 1)
    def _():
        for name in ("dk", "dv"):
            refs[name][...] = refs[f"{name}_sum"][...].astype(refs[name].dtype)


def _backward_pack(sizes, refs, pair, step, distances, pack):
    keys, values, dtype = pack.lanes(sizes.key_dim), pack.lanes(sizes.value_dim), refs["q"].dtype
    q, d_o = pair.load_queries(refs["q"], keys), pair.load_queries(refs["d_o"], values)
    k, v = pair.load_keys(refs["k"], keys), pair.load_keys(refs["v"], values)
    n, m = q.shape[0], k.shape[0]
    dq, dk, dv = (
        refs["dq_sum"][step.t, :n, keys],
        refs["dk_sum"][:m, keys],
        refs["dv_sum"][:m, values],
    )
    splits = (pack.split(x) for x in (q, k, d_o))
    all_weights = _weights(refs, step, distances, pack)
    for head, (own_q, own_k, own_d_o, weights) in enumerate(zip(*splits, all_weights, strict=True)):
        scores = dot(own_q, k, ROWS_BY_ROWS) * weights
        d_scores = dot(own_d_o, v, ROWS_BY_ROWS)
        # Summed over queries only: the lanes' sum is left to the caller.
        products = scores * d_scores
        for i, apart in enumerate((distances.rows, distances.columns)):
            total = jnp.sum(products * apart, 0, keepdims=True)
            refs["d_rates"][pack.first + head, pl.ds(i, 1), :m] += total
        scores, d_scores = scores.astype(dtype), (d_scores * weights).astype(dtype)
        dq += dot(d_scores, own_k)
        dk += dot(d_scores, own_q, COLUMNS_BY_COLUMNS)
        dv += dot(scores, own_d_o, COLUMNS_BY_COLUMNS)
    refs["dq_sum"][step.t, :n, keys] = dq
    refs["dk_sum"][:m, keys] = dk
    refs["dv_sum"][:m, values] = dv
