"""A tokenizer's losses against PyTorch, and what reviving dead codes promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch.nn import functional

from lasad_jax.training import tokenizer_losses
from lasad_jax.training.tokenizer_losses import (
    codebook_loss,
    commitment_loss,
    entropy_loss,
    generator_loss,
    hinge_discriminator_loss,
    reconstruction_loss,
    revive,
)


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(shape, seed):
    x = normal(shape, seed)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_as_in_torch(ours, theirs, *arrays, rtol=1e-5):
    """The same value and the same gradient of every argument."""
    value, gradients = jax.value_and_grad(ours, argnums=tuple(range(len(arrays))))(*arrays)
    assert value.shape == () and value.dtype == jnp.float32
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    expected = theirs(*tensors)
    np.testing.assert_allclose(value, expected.detach(), rtol=rtol, atol=1e-6)
    expected.backward()
    for gradient, tensor in zip(gradients, tensors, strict=True):
        wanted = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(gradient, wanted, atol=1e-6 + 1e-4 * np.abs(wanted).max())


# Distances


@pytest.mark.parametrize(
    ("kind", "theirs"), [("l2", functional.mse_loss), ("l1", functional.l1_loss)]
)
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (1, 1, 1, 1)])
def test_reconstruction_losses_are_those_of_pytorch(kind, theirs, shape):
    ours = lambda a, b: reconstruction_loss(a, b, kind)
    assert_as_in_torch(ours, theirs, normal(shape, 0), normal(shape, 1))


def test_reconstruction_loss_is_computed_in_float32_and_for_each_image():
    a, b = (jnp.asarray(normal((3, 4, 5, 1), seed), jnp.bfloat16) for seed in (0, 1))
    got = jax.vmap(reconstruction_loss, (0, 0, None))(a, b, "l2")
    expected = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean((1, 2, 3))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_unknown_reconstruction_loss_is_named():
    with pytest.raises(ValueError, match=r"losses\.reconstruction: 'huber'.*l2.*l1"):
        reconstruction_loss(jnp.zeros(2), jnp.zeros(2), "huber")


def test_codebook_and_commitment_move_one_side_each():
    quantized, z = unit((2, 3, 5, 4), 0), unit((2, 3, 5, 4), 1)
    theirs = lambda moved, fixed: functional.mse_loss(moved, fixed.detach())
    assert_as_in_torch(codebook_loss, theirs, quantized, z)
    assert_as_in_torch(commitment_loss, theirs, z, quantized)


# Entropy


def torch_entropy_loss(z, codebook, temperature=0.01):
    z = z.reshape(-1, z.shape[-1])
    codebook = functional.normalize(codebook, dim=-1)
    logits = -torch.cdist(z, codebook).square() / temperature
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    mean = logits.softmax(-1).mean(0)
    return entropy + torch.xlogy(mean, mean).sum()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_entropy_loss_is_that_of_pytorch(temperature):
    z, codebook = unit((2, 3, 5, 4), 0), normal((17, 4), 1)
    assert_as_in_torch(
        lambda z, codebook: entropy_loss(z, codebook, temperature),
        lambda z, codebook: torch_entropy_loss(z, codebook, temperature),
        z,
        codebook,
    )


def test_entropy_loss_at_the_default_temperature_stays_finite():
    # Most probabilities underflow: -|z - e|^2 / 0.01 goes down to -400.
    z, codebook = unit((2, 2, 3, 4), 0), unit((50, 4), 1)
    codebook[1:20] = -z[0, 0, 0]
    value, gradients = jax.value_and_grad(entropy_loss, (0, 1))(z, codebook)
    expected = torch_entropy_loss(*(torch.tensor(x, dtype=torch.float64) for x in (z, codebook)))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in gradients)


def test_entropy_loss_in_parts_is_the_same_and_takes_less_memory(monkeypatch):
    z, codebook = unit((2, 4, 12, 4), 0), unit((1000, 4), 1)

    def run():
        loss = lambda z, codebook: entropy_loss(z, codebook, 0.2)
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(z, codebook).compile()
        return compiled(z, codebook), compiled.memory_analysis().temp_size_in_bytes

    whole, most = run()
    assert most > 4 * 48 * 2 * 1000
    # Room for 7 of the 48 places, of which 6 divide them; and for less than one.
    for room, part in ((7 * 2 * 1000, 6), (3, 1)):
        monkeypatch.setattr(tokenizer_losses, "_MAX_AFFINITIES", room)
        got, least = run()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, whole)
        assert least < most * part / 48 + 100_000


@pytest.mark.parametrize("V", [1, 2, 9])
def test_entropy_loss_is_least_when_all_codes_are_used_alike(V):
    codebook = np.eye(9, dtype=np.float32)[:V]
    even = codebook[None, :, None]
    np.testing.assert_allclose(entropy_loss(even, codebook), -np.log(V), atol=1e-5)
    np.testing.assert_allclose(entropy_loss(even[:, :1], codebook), 0, atol=1e-5)


# Discriminator


def test_hinge_and_generator_losses_are_those_of_pytorch():
    real, fake = normal((2, 3, 5), 0), normal((2, 3, 5), 1)
    hinge = lambda real, fake: (
        functional.relu(1 - real).mean() / 2 + functional.relu(1 + fake).mean() / 2
    )
    assert_as_in_torch(hinge_discriminator_loss, hinge, real, fake)
    assert_as_in_torch(generator_loss, lambda fake: -fake.mean(), fake)
    assert generator_loss(jnp.asarray(fake, jnp.bfloat16)).dtype == jnp.float32


# Dead codes


def revived(V, M, dead, seed=0):
    counts = np.ones(V, np.int32)
    counts[np.random.default_rng(seed).permutation(V)[:dead]] = 0
    codebook, z = unit((V, 4), 1), normal((M, 4), 2)
    new, mask = jax.jit(revive)(codebook, counts, z, jax.random.key(seed))
    np.testing.assert_array_equal(mask, counts == 0)
    np.testing.assert_array_equal(new[~mask], codebook[~mask])
    return np.asarray(new)[mask], z / np.linalg.norm(z, axis=-1, keepdims=True)


def nearest(x, rows):
    distance = np.linalg.norm(x[:, None] - rows, axis=-1)
    return distance.argmin(1), distance.min(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**31 - 1))
def test_dead_codes_become_different_vectors_of_the_batch(dead, seed):
    new, rows = revived(12, 15, dead, seed)
    assert len(new) == dead
    if dead:
        index, distance = nearest(new, rows)
        assert len(set(index)) == dead and distance.max() < 1e-6


def test_rows_serve_again_where_there_are_too_few_but_no_two_codes_are_the_same():
    new, rows = revived(12, 3, 11)
    index, distance = nearest(new, rows)
    np.testing.assert_array_equal(np.sort(np.bincount(index)), [3, 4, 4])
    assert np.sum(distance < 1e-6) == 3 and distance.max() < 0.01
    assert len(np.unique(new, axis=0)) == 11
    np.testing.assert_allclose(np.linalg.norm(new, axis=-1), 1, atol=1e-6)
    new, _ = revived(5, 1, 5)
    assert len(np.unique(new, axis=0)) == 5


def test_reviving_is_a_function_of_its_key():
    first, _ = revived(12, 40, 6, seed=0)
    again, _ = revived(12, 40, 6, seed=0)
    other = jax.jit(revive)(
        unit((12, 4), 1), np.zeros(12, np.int32), normal((40, 4), 2), jax.random.key(7)
    )[0]
    np.testing.assert_array_equal(first, again)
    assert not np.any(np.all(other[:6] == first, axis=-1))


def test_reviving_does_not_depend_on_the_number_of_devices():
    codebook, z, counts = unit((6, 4), 1), normal((16, 4), 2), np.array([0, 1, 0, 0, 2, 0])
    whole, _ = jax.jit(revive)(codebook, counts, z, jax.random.key(3))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    arguments = put(codebook), put(counts), put(z, "data"), put(jax.random.key(3))
    np.testing.assert_array_equal(jax.jit(revive)(*arguments)[0], whole)
