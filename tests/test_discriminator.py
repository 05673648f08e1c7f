"""The PatchGAN against PyTorch with the same weights, and what it asks of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch.nn import functional

from lasad_jax.config.sections import LossConfig
from lasad_jax.models.discriminator import PatchDiscriminator, check_discriminator


def images_of(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def shapes(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]


def random_params(model, shape, seed=1):
    """Every parameter of its own size, none of them zero."""
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(0.1, 1 / np.sqrt(np.prod(x.shape[:-1]) + 1), x.shape)
    return jax.tree.map(lambda x: draw(x).astype(np.float32), shapes(model, shape))


def torch_discriminator(params, images):
    """pix2pix's network, layer by layer."""
    tensor = lambda x: torch.tensor(np.asarray(x))
    kernel = lambda i: tensor(params[f"conv_{i}"]["kernel"]).permute(3, 2, 0, 1)
    bias = lambda i: tensor(params[f"conv_{i}"]["bias"]) if "bias" in params[f"conv_{i}"] else None
    last = sum(name.startswith("conv") for name in params) - 1
    x = images.permute(0, 3, 1, 2)
    for i in range(last + 1):
        x = functional.conv2d(x, kernel(i), bias(i), stride=2 if i < last - 1 else 1, padding=1)
        if 0 < i < last:
            norm = params[f"norm_{i}"]
            scale, shift = tensor(norm["scale"]), tensor(norm["bias"])
            x = functional.batch_norm(x, None, None, scale, shift, training=True)
        if i < last:
            x = functional.leaky_relu(x, 0.2)
    return x[:, 0]


@pytest.mark.parametrize(
    ("layers", "shape"), [(3, (3, 32, 48, 3)), (2, (2, 33, 40, 1)), (1, (2, 7, 6, 3))]
)
def test_logits_and_gradients_are_those_of_pytorch(layers, shape):
    model = PatchDiscriminator(width=6, layers=layers)
    params, images = random_params(model, shape), images_of(shape)
    theirs = torch.tensor(images, requires_grad=True)
    expected = torch_discriminator(params, theirs)
    weights = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    @jax.jit
    def logits_and_gradient(images):
        logits, pull = jax.vjp(lambda x: model.apply({"params": params}, x), images)
        return logits, *pull(weights)

    logits, gradient = logits_and_gradient(images)
    assert logits.shape == (shape[0], shape[1] // 2**layers - 2, shape[2] // 2**layers - 2)
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-5, atol=1e-5)
    expected = theirs.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_parameters_are_those_of_the_original():
    params = shapes(PatchDiscriminator(), (1, 32, 32, 3))
    widths = [3, 64, 128, 256, 512, 1]
    for i in range(5):
        conv = params[f"conv_{i}"]
        assert conv["kernel"].shape == (4, 4, *widths[i : i + 2])
        assert ("bias" in conv) == (i in (0, 4))
    assert sorted(params) == [*(f"conv_{i}" for i in range(5)), "norm_1", "norm_2", "norm_3"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_765_633
    # At the fourth doubling the width stays at 8 times.
    deep = shapes(PatchDiscriminator(width=2, layers=5), (1, 96, 96, 3))
    assert [deep[f"conv_{i}"]["kernel"].shape[-1] for i in range(7)] == [2, 4, 8, 16, 16, 16, 1]


def test_initial_values_have_the_originals_spread():
    model = PatchDiscriminator(width=64, layers=1)
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 6, 6, 3)))["params"]
    kernel, norm = np.asarray(params["conv_1"]["kernel"]), params["norm_1"]
    assert abs(kernel.std() - 0.02) < 2e-4 and abs(kernel.mean()) < 2e-4
    scale = np.asarray(norm["scale"])
    assert abs(scale.mean() - 1) < 6e-3 and abs(scale.std() - 0.02) < 4e-3
    assert not np.any(norm["bias"]) and not np.any(params["conv_0"]["bias"])


def test_bfloat16_is_close_to_float32():
    shape = (2, 32, 24, 3)
    exact, rough = PatchDiscriminator(width=8), PatchDiscriminator(width=8, dtype=jnp.bfloat16)
    params, images = random_params(exact, shape), images_of(shape)
    exact, rough = (jax.jit(model.apply)({"params": params}, images) for model in (exact, rough))
    assert exact.dtype == rough.dtype == jnp.float32
    error = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_norms_see_the_whole_batch_on_any_number_of_devices():
    shape = (8, 16, 24, 3)
    model = PatchDiscriminator(width=4, layers=2)
    # Images of different brightness: a device's own statistics would be far off.
    images = images_of(shape) * np.arange(1, 9, dtype=np.float32)[:, None, None, None]
    params = random_params(model, shape)
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    whole = apply(params, images)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(apply(params, split), whole, atol=1e-5)
    alone = apply(params, images[:2])
    assert np.abs(alone - whole[:2]).max() > 1e-2


def test_the_smallest_images_that_fit_give_one_patch():
    for layers, side in ((1, 6), (2, 12), (3, 24)):
        config = LossConfig(discriminator_layers=layers)
        check_discriminator(config, (side, side + 9))
        model = PatchDiscriminator(width=2, layers=layers)
        images = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
        assert logits.shape == (1, 1, 1)
        with pytest.raises(ValueError, match=rf"losses\.discriminator_layers: {layers} needs"):
            check_discriminator(config, (side + 9, side - 1))


def test_too_small_images_are_told_what_to_do():
    config = LossConfig(discriminator_layers=4)
    with pytest.raises(ValueError, match=r"at least 48 pixels.*these are 64 x 23; set it to.* 2$"):
        check_discriminator(config, (64, 23))
    with pytest.raises(ValueError, match=r"5 x 64; set losses\.adversarial_weight=0"):
        check_discriminator(config, (5, 64))
