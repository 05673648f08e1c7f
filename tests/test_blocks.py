"""The generator's blocks as a whole: against a plain model in float64, dropout, the loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import precise_jit, quick_jit
from tiny import initial_parameters

from lasad_jax.models import LASADGen, ModelConfig, layers
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.passes import add_norm, gated_products, local_conv, row_losses, split_heads
from lasad_jax.training.cross_entropy import mean_loss

EPSILON = 1e-5
# Rows down and columns to the right of what a token's convolution sees besides itself.
EARLIER = [(0, -1), (0, -2), *((row, column) for row in (-1, -2) for column in range(-2, 3))]
CONFIG = ModelConfig(
    vocab_size=13,
    num_classes=3,
    grid=(3, 5),
    num_layers=3,
    width=32,
    num_heads=2,
    ffn_width=48,
    dropout=0.0,
    class_dropout=0.0,
    dtype="float32",
    remat="none",
)
SOFTMAX = {"mixer": "softmax"}


def case(seed=0, **changes):
    """A configuration, random parameters with scales away from 1, codes and labels."""
    config = dataclasses.replace(CONFIG, **changes)
    params = initial_parameters(config, seed)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)
    tokens = rng.integers(0, config.vocab_size, (3, config.num_tokens))
    return config, params, tokens, np.array([0, 2, config.num_classes])


def loss(config, params, tokens, labels, key=None):
    """The loss of a training step; dropout is on if there is a key."""
    model, rngs = LASADGen(config, train=key is not None), key if key is None else {"dropout": key}
    factors = model.apply({"params": params}, tokens, labels, rngs=rngs, method="before_head")
    return mean_loss(*factors, tokens)


def loss_and_gradients(config, *args, jit=quick_jit):
    return jit(jax.value_and_grad(functools.partial(loss, config)))(*args)


def assert_close(got, want, tolerance):
    """Every leaf, in norm; what is 0 but for rounding, such as a row's decay of one row, is 0."""

    def compare(path, x, y):
        difference = np.linalg.norm(np.asarray(x, np.float64) - y)
        assert difference <= tolerance * np.linalg.norm(y) + 1e-12, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, got, want)


# A plain model: every projection a product of its own, every scale where the norm is


def plain_loss(config, params, tokens, labels):
    embed = lambda name, ids: params[name]["embedding"][ids]
    x = embed("class_embedding", labels)[:, None]
    x = jnp.concatenate([x, embed("token_embedding", tokens[:, :-1])], axis=1)
    for i in range(config.num_layers):
        block = jax.tree.map(lambda stacked, i=i: stacked[i], params["blocks"])
        x += plain_mixer(config, block["mixer"], normed(x, block["mixer_norm"]["scale"]))
        kernels = (block["ffn"][name]["kernel"] for name in ("gate", "up", "down"))
        gate, up, down = kernels
        y = normed(x, block["ffn_norm"]["scale"])
        if config.has_local_conv:
            y = convolved(y, block["conv"]["kernel"], config.grid[1])
        x += (jax.nn.silu(y @ gate) * (y @ up)) @ down
    logits = normed(x, params["final_norm"]["scale"]) @ params["head"]["kernel"]
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return -right.mean()


def normed(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def plain_mixer(config, params, x):
    places = np.arange(config.num_tokens)[: x.shape[1] - 1]
    rows, columns = np.divmod(places, config.grid[1])
    project = lambda name: jnp.einsum("bnd,dhk->bnhk", x, params[name]["kernel"])
    q, k, v, gate = map(project, ("q", "k", "v", "out_gate"))
    q, k = jax.nn.silu(q) * config.query_dim**-0.5, jax.nn.silu(k)
    if config.rope:
        q, k = rotated(q, rows, columns), rotated(k, rows, columns)
    rate = lambda name: jax.nn.softplus(params[name])
    steps = jnp.where((columns == 0)[:, None], -rate("row_rate"), -rate("column_rate"))[None]
    if config.selective:
        raw = x[:, 1:] @ params["decay_gate"]["kernel"] + params["decay_gate"]["bias"]
        steps = steps - jax.nn.softplus(raw)
    since = jnp.cumsum(steps, axis=1)
    weights = jnp.exp(since[:, :, None] - since[:, None])  # B, t, s, H
    weights = jnp.pad(weights, [(0, 0), (1, 0), (1, 0), (0, 0)])
    weights = weights.at[:, :, 0].set(1)  # the prefix is never decayed
    weights *= np.tri(x.shape[1])[..., None]
    out = jnp.einsum("bthk,bshk,btsh,bshv->bthv", q, k, weights, v)
    out = normed(out, params["norm"]["scale"]) * jax.nn.silu(gate)
    return jnp.einsum("bthv,hvd->btd", out, params["out"]["kernel"])


def convolved(x, kernel, width):
    """x and, at each tap, the token that stands there, if any does."""
    rows, columns = np.divmod(np.arange(x.shape[1] - 1), width)
    token = {place: 1 + i for i, place in enumerate(zip(rows, columns, strict=True))}
    y = x + kernel[0] * x
    for tap, (down, right) in enumerate(EARLIER, start=1):
        pairs = [
            (here, token[row + down, column + right])
            for (row, column), here in token.items()
            if (row + down, column + right) in token
        ]
        if pairs:
            here, there = np.transpose(pairs)
            y = y.at[:, here].add(kernel[tap] * x[:, there])
    return y


def rotated(x, rows, columns):
    """Pairs as complex numbers, half of them turned by row, half by column."""
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    frequencies = 1e4 ** (-2 * np.arange(x.shape[-1] // 4) / (x.shape[-1] // 2))
    angles = np.concatenate([place[:, None] * frequencies for place in (rows, columns)], axis=1)
    turns = np.concatenate([np.ones((1, angles.shape[1])), np.exp(1j * angles)])
    pairs = pairs * turns[:, None]
    return jnp.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


@pytest.fixture
def kernels_without_a_gpu(monkeypatch):
    """All of Triton's kernels, interpreted; memory that none has written is NaN."""
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA A100"))
    made = [
        *((module, "kernels") for module in (add_norm, gated_products, local_conv, split_heads)),
        (row_losses, "kernel"),
        (choice, "recurrence"),
    ]
    for module, name in made:
        function = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, function)


PLAIN_CASES = [
    {},
    {"grid": (1, 7), "key_dim": 16, "num_heads": 1},
    {"grid": (4, 3), "key_dim": 16, "selective": False, "rope": False, "local_conv": "off"},
]


def check_against_the_plain_model(changes):
    config, params, tokens, labels = case(**changes)
    got = loss_and_gradients(config, params, tokens, labels)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        function = quick_jit(jax.value_and_grad(functools.partial(plain_loss, config)))
        want = jax.tree.map(np.asarray, function(wide, tokens, labels))
    assert want[0].dtype == np.float64
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("changes", PLAIN_CASES, ids=str)
def test_gradients_of_joint_projections_are_those_of_separate_products(changes):
    check_against_the_plain_model(changes)


@pytest.mark.parametrize("remat", ["none", "cheap", "lean", "block"])
def test_the_same_with_every_kernel(remat, kernels_without_a_gpu):
    """The kernels of a block leave parts of gradients to each other: nothing is read that none
    has written."""
    check_against_the_plain_model({"num_layers": 2, "remat": remat, "unroll": 1})


# The output


@pytest.mark.parametrize("changes", [{}, SOFTMAX], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_the_factors_before_the_head_multiply_to_the_logits(train, changes):
    config, params, tokens, labels = case(dropout=0.2, **changes)
    apply = functools.partial(LASADGen(config, train=train).apply, {"params": params})
    run = quick_jit(
        functools.partial(apply, rngs={"dropout": jax.random.key(1)}), static_argnames="method"
    )
    x, kernel = run(tokens, labels, method="before_head")
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert_close(run(tokens, labels, method="__call__"), logits, 1e-6)


# The loop over layers


@pytest.mark.parametrize(
    ("changes", "unrolled"),
    [({}, (2, CONFIG.num_layers)), ({"remat": "cheap"}, (2,)), (SOFTMAX, (CONFIG.num_layers,))],
    ids=str,
)
def test_unrolled_layers_have_the_same_loss_and_gradients(changes, unrolled):
    """Dropout too: a layer's masks do not depend on how the loop is compiled."""

    def results(unroll):
        config, *args = case(unroll=unroll, dropout=0.2, class_dropout=0.2, **changes)
        return loss_and_gradients(config, *args, jax.random.key(3), jit=precise_jit)

    rolled = results(1)
    for unroll in unrolled:
        assert_close(results(unroll), rolled, 1e-5)


# Dropout


@pytest.fixture
def drawn(monkeypatch):
    """The seeds of every mask that is made, as they are made."""
    seen, real = [], layers.token_seeds

    def token_seeds(key, shape):
        seeds = real(key, shape)
        return jax.pure_callback(see, seeds, seeds)

    def see(seeds):
        seen.append(np.asarray(seeds).tobytes())
        return seeds

    monkeypatch.setattr(layers, "token_seeds", token_seeds)
    return seen


@pytest.mark.parametrize("unroll", [1, CONFIG.num_layers])
def test_every_residual_sum_draws_its_own_mask(unroll, drawn):
    config, params, tokens, labels = case(dropout=0.2, unroll=unroll)
    jax.block_until_ready(
        quick_jit(functools.partial(loss, config))(params, tokens, labels, jax.random.key(0))
    )
    # The embedding and two branches of each layer.
    assert len(drawn) == len(set(drawn)) == 1 + 2 * config.num_layers


@pytest.mark.parametrize("remat", ["block", "lean", "cheap"])
def test_what_is_computed_again_drops_the_same(remat, drawn):
    config, params, tokens, labels = case(dropout=0.2, remat=remat)
    jax.block_until_ready(loss_and_gradients(config, params, tokens, labels, jax.random.key(0)))
    assert len(set(drawn)) == 1 + 2 * config.num_layers


@pytest.mark.parametrize("changes", [{}, SOFTMAX], ids=str)
def test_without_a_rate_training_is_evaluation(changes):
    config, params, tokens, labels = case(**changes)
    run = lambda train: quick_jit(LASADGen(config, train).apply)({"params": params}, tokens, labels)
    np.testing.assert_array_equal(run(True), run(False))


def test_dropout_is_noise_around_the_model_without_it():
    """Most of what a draw changes is gone from the mean of many, and the key decides it."""
    config, params, tokens, labels = case(dropout=0.005)
    model = LASADGen(config, train=True)
    draw = lambda key: model.apply({"params": params}, tokens, labels, rngs={"dropout": key})
    keys = jax.random.split(jax.random.key(0), 200)
    logits = np.asarray(quick_jit(jax.vmap(draw))(keys), np.float64)
    exact = np.asarray(quick_jit(LASADGen(config).apply)({"params": params}, tokens, labels))
    noise = np.sqrt(np.mean((logits - exact) ** 2))
    assert np.sqrt(np.mean((logits.mean(0) - exact) ** 2)) < 0.35 * noise
    assert noise > 0.05 * np.std(exact)
    # No two draws are alike, and the same key is.
    assert len({x.tobytes() for x in logits}) == len(keys)
    run = quick_jit(draw)
    np.testing.assert_array_equal(run(keys[0]), run(keys[0]))


def test_a_residual_sum_keeps_its_mean():
    """The kept elements grow by 1 / (1 - rate), which the norm behind would hide."""
    config = dataclasses.replace(CONFIG, dropout=0.3)
    rng = np.random.default_rng(0)
    x, branch = rng.standard_normal((2, 2, 4, config.width), np.float32)
    module = layers.AddNorm(config, train=True)
    variables = {"params": {"scale": jnp.ones(config.width)}}
    draw = lambda key: module.apply(variables, x, branch, rngs={"dropout": key})[0]
    sums = np.asarray(quick_jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
    # Five deviations of a mean of 4000.
    allowed = 5 * np.abs(branch) * np.sqrt(0.3 / 0.7 / 4000) + 1e-5
    assert (np.abs(sums.mean(0) - (x + branch)) < allowed).all()
