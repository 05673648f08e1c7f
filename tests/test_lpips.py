"""LPIPS against PyTorch with the same random weights, and its files."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.nn import functional

from lasad_jax.models.lpips import check_perceptual, load_lpips, lpips

# torchvision's vgg16().features: N of every convolution, with its channels.
CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
POOLINGS = (4, 9, 16, 23)
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


@pytest.fixture(scope="module")
def vgg16():
    rng = np.random.default_rng(0)
    state = {}
    for n, (inputs, outputs) in CONVOLUTIONS.items():
        kernel = rng.normal(0, np.sqrt(2 / (9 * inputs)), (outputs, inputs, 3, 3))
        state[f"features.{n}.weight"] = kernel.astype(np.float32)
        state[f"features.{n}.bias"] = rng.normal(0, 0.1, outputs).astype(np.float32)
    state["classifier.6.bias"] = np.zeros(1000, np.float32)
    return state


@pytest.fixture(scope="module")
def lins():
    rng = np.random.default_rng(1)
    return {
        f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32)
        for i, channels in enumerate((64, 128, 256, 512, 512))
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory, vgg16, lins):
    folder = tmp_path_factory.mktemp("weights")
    for name, state in (("vgg16", vgg16), ("lpips", lins)):
        safetensors.numpy.save_file(state, folder / f"{name}.safetensors")
        torch.save({k: torch.tensor(x) for k, x in state.items()}, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def params(files):
    return load_lpips(files / "vgg16.safetensors", files / "lpips.safetensors")


def torch_lpips(vgg16, weights, a, b):
    """From the definition: features, unit vectors, squared difference, weighted sum."""
    features = []
    for x in (a, b):
        if x.shape[-1] == 1:
            x = torch.cat([x] * 3, dim=-1)
        x = x.permute(0, 3, 1, 2)
        shift, scale = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        x, seen = (x - shift) / scale, []
        for n in range(30):
            if n in CONVOLUTIONS:
                kernel, bias = (
                    torch.tensor(vgg16[f"features.{n}.{leaf}"]) for leaf in ("weight", "bias")
                )
                x = functional.conv2d(x, kernel, bias, padding=1)
            elif n in POOLINGS:
                x = functional.max_pool2d(x, 2, 2)
            else:
                x = functional.relu(x)
            if n in TAPS:
                seen.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(seen)
    total = 0
    for w, x, y in zip(weights, *features, strict=True):
        total = total + functional.conv2d((x - y) ** 2, torch.tensor(w)).mean((1, 2, 3))
    return total


@jax.jit
def values_and_gradient(params, a, b):
    values, pull = jax.vjp(lambda a: lpips(params, a, b), a)
    return values, *pull(jnp.ones(len(a)))


def pair(shape, seed=2):
    rng = np.random.default_rng(seed)
    return (rng.uniform(-1, 1, shape).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("shape", [(2, 33, 40, 3), (2, 16, 21, 1)])
def test_distance_and_gradient_are_those_of_pytorch(params, vgg16, lins, shape):
    a, b = pair(shape)
    theirs = torch.tensor(a, requires_grad=True)
    expected = torch_lpips(vgg16, lins.values(), theirs, torch.tensor(b))
    expected.sum().backward()
    ours, gradient = values_and_gradient(params, a, b)
    assert ours.shape == shape[:1] and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected.detach(), rtol=1e-4)
    expected = theirs.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_channels_weigh_equally_without_a_file(files, vgg16):
    equal = [np.full((1, n, 1, 1), 1 / n, np.float32) for n in (64, 128, 256, 512, 512)]
    a, b = pair((1, 17, 16, 3))
    expected = torch_lpips(vgg16, equal, torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(lpips(load_lpips(files / "vgg16.pth"), a, b), expected, rtol=1e-4)


def test_equal_images_are_at_distance_zero_and_order_does_not_matter(params):
    a, b = pair((2, 16, 16, 3))
    assert not np.any(lpips(params, a, a))
    np.testing.assert_allclose(lpips(params, a, b), lpips(params, b, a), rtol=1e-5)


def test_gradient_is_finite_where_no_feature_is_active(params):
    silent = jax.tree.map(lambda x: x, params)
    silent["vgg16"][4][2] = {
        "kernel": jnp.zeros((3, 3, 512, 512)),
        "bias": -jnp.ones(512),
    }
    a, b = pair((1, 16, 16, 3))
    _, gradient = values_and_gradient(silent, a, b)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)


def test_both_formats_give_the_same_parameters(files, params):
    other = load_lpips(str(files / "vgg16.pth"), str(files / "lpips.pth"))
    jax.tree.map(np.testing.assert_array_equal, other, params)


def test_unfit_images_are_refused(params):
    image = jnp.zeros((1, 20, 15, 3))
    with pytest.raises(ValueError, match=r"losses\.perceptual_weight.*16 pixels.*20 x 15; set it"):
        lpips(params, image, image)
    check_perceptual((16, 99))
    with pytest.raises(ValueError, match="9 x 16"):
        check_perceptual((9, 16))
    for other in (jnp.zeros((1, 20, 15, 1)), jnp.zeros((20, 15, 3))):
        with pytest.raises(ValueError, match=r"must be \(B, h, w, 1 or 3\)"):
            lpips(params, image, other)
    with pytest.raises(ValueError, match=r"1 or 3"):
        lpips(params, jnp.zeros((1, 20, 20, 4)), jnp.zeros((1, 20, 20, 4)))


# Files


def test_missing_files_are_named_by_their_field(tmp_path, files):
    with pytest.raises(FileNotFoundError, match=r"losses\.vgg16: .*none\.pth.*vgg16-397923af\.pth"):
        load_lpips(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"losses\.lpips: .*none\.pth.*v0\.1/vgg\.pth"):
        load_lpips(files / "vgg16.safetensors", tmp_path / "none.pth")


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_spoiled_files_are_refused(tmp_path, end):
    path = tmp_path / f"spoiled.{end}"
    path.write_bytes(b"not a file of tensors" * 9)
    with pytest.raises(ValueError, match=r"losses\.vgg16: .*spoiled.*cannot be read"):
        load_lpips(path)


def test_torch_files_without_a_state_dict_are_refused(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ValueError, match=r"losses\.vgg16: .*list\.pth.*cannot be read"):
        load_lpips(path)


def test_missing_and_misshapen_tensors_are_named(tmp_path, files, vgg16, lins):
    path = tmp_path / "changed.safetensors"
    part = {k: x for k, x in vgg16.items() if k != "features.28.bias"}
    safetensors.numpy.save_file(part, path)
    with pytest.raises(ValueError, match=r"losses\.vgg16.*no tensor 'features\.28\.bias'"):
        load_lpips(path)
    safetensors.numpy.save_file(vgg16 | {"features.0.weight": np.zeros((64, 1, 3, 3))}, path)
    message = r"losses\.vgg16: 'features\.0\.weight'.*\(64, 1, 3, 3\), not \(64, 3, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        load_lpips(path)
    safetensors.numpy.save_file(lins | {"lin2.model.1.weight": np.zeros((1, 9, 1, 1))}, path)
    with pytest.raises(ValueError, match=r"losses\.lpips: 'lin2\.model\.1\.weight'"):
        load_lpips(files / "vgg16.safetensors", path)


def test_torch_is_only_needed_for_its_own_files(files, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    got = load_lpips(files / "vgg16.safetensors", files / "lpips.safetensors")
    jax.tree.map(np.testing.assert_array_equal, got, params)
    with pytest.raises(ImportError, match=r"losses\.vgg16.*pip install torch\); a \.safetensors"):
        load_lpips(files / "vgg16.pth")
