"""What the benchmarks of generators count and measure, and how their tables look."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from lasad_jax.benchmarks import limits, tables
from lasad_jax.models import LASADGen, ModelConfig, count_parameters, counts
from lasad_jax.models.generator import init_cache, init_parameters
from lasad_jax.training.state import unbox


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products in a program, loops and calls unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[i] for i in contracted)
            )
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * product_flops(inner)
    return total


def test_flops_are_those_of_the_traced_step():
    config = ModelConfig(
        vocab_size=1500,  # too many for a product with one-hot vectors
        num_classes=7,
        grid=(3, 5),
        num_layers=3,
        width=32,
        num_heads=2,
        mixer="softmax",
        remat="none",
        dtype="float32",
    )
    batch, tokens = 2, 2 * 15
    params = unbox(init_parameters(config, jax.random.key(0)))
    codes, labels = jnp.zeros((batch, 15), jnp.int32), jnp.zeros(batch, jnp.int32)
    loss = lambda params: LASADGen(config).apply({"params": params}, codes, labels).sum()
    of_classes = 2 * batch * 8 * 32  # the one-hot product with the class embedding
    ours = counts.product_flops(config, tokens) + counts.attention_flops(config, tokens)
    forward = product_flops(jax.make_jaxpr(loss)(params).jaxpr)
    assert forward == ours / 3 + of_classes
    # Backward: each product twice, but the class's one-hot vector needs no gradient.
    step = product_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr)
    assert step == ours + 2 * of_classes


def test_flops_of_lasad_by_hand():
    config = ModelConfig(
        vocab_size=50, grid=(3, 5), num_layers=3, width=32, num_heads=2, key_dim=8, ffn_width=40
    )
    mixer = 32 * (2 * 8 + 2 * 8 + 2 * 16 + 2 * 16) + 32 * 2 + 32 * 32  # q k v gate, decay, out
    parameters = 3 * (mixer + 3 * 32 * 40) + 32 * 50
    assert counts.product_parameters(config) == parameters
    assert counts.product_flops(config, 7) == 6 * 7 * parameters
    assert counts.attention_flops(config, 7) == 3 * 7 * 3 * 2 * (2 * 8 * 16 + 2 * 8 * 16)


@pytest.mark.parametrize("decay", ["raster", "manhattan"])
def test_bytes_of_a_token_are_those_of_the_arrays(decay):
    sizes = {"num_layers": 3, "width": 32, "num_heads": 2, "vocab_size": 50, "num_classes": 7}
    config = ModelConfig(grid=(3, 5), decay=decay, selective=decay == "raster", **sizes)
    read = counts.read_per_token(config, rows=6)
    embeddings = (50 + 8) * 32
    assert read["parameters"] == 2 * (count_parameters(config) - embeddings + 6 * 32)
    assert read["state"] == 2 * init_cache(config, 6).mixer.memory.size

    softmax = ModelConfig(grid=(3, 5), mixer="softmax", **sizes)
    empty = init_cache(softmax, 6)
    per_token = 2 * (empty.mixer.k.size + empty.mixer.v.size) // (1 + 15)
    # The first step reads the class and a code, the last one all but the last code.
    steps = range(2, 15 + 1)
    average = per_token * sum(steps) / len(steps)
    assert counts.read_per_token(softmax, rows=6)["state"] == average


def test_memory_counts_donated_arrays_once():
    x = jnp.zeros(2**18)
    add = lambda x: x + 1
    kept, donated = (
        limits.compiled_bytes(jax.jit(add, donate_argnums=which).lower(x).compile())
        for which in ((), (0,))
    )
    assert (kept, donated) == (2 * x.nbytes, x.nbytes)


def test_allocator_peak_counts_only_where_it_rises(monkeypatch):
    peaks = iter([100, 100, 100, 250, None, None])
    monkeypatch.setattr(limits, "_peak", lambda: next(peaks))
    assert [limits.AllocatorPeak().bytes() for _ in range(3)] == [None, 250, None]


def test_rate_of_a_product():
    assert 1e7 < limits.product_flops_per_second(64, repeats=2) < 1e15


def test_a_row_shows_its_reason_once():
    columns = (
        tables.column("a", "a", width=1),
        tables.column("b", "b", tables.digits(1e3, " x"), width=1),
        tables.column("c", "c", tables.percent, width=1),
    )
    assert tables.row_line({"a": 1, "b": 0.25, "c": 0.0123}, columns) == "| 1 | 250 x | 1.23 % |"
    assert tables.row_line({"a": 1, "skipped": "why"}, columns) == "| 1 | why | - |"
    assert tables.head(columns) == "| a | b | c |\n| --- | --- | --- |"
