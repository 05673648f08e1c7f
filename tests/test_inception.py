"""FID's Inception against the packages pytorch-fid and torch-fidelity; the file of its weights."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch_inception import (
    pytorch_fid_pooled,
    random_state,
    torch_fidelity_features,
    torch_fidelity_network,
    torch_fidelity_resized,
)

from lasad_jax.evaluation.inception import inception_features, resize
from lasad_jax.interop import inception_files
from lasad_jax.interop.inception_files import load_inception


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(file):
    return load_inception(file, any_fingerprint=True)


@pytest.fixture(scope="module")
def reference(file):
    return torch_fidelity_network(file)


def draw(*shape):
    return np.random.default_rng(shape).integers(0, 256, shape, np.uint8)


def assert_close(ours, theirs):
    """Within 1e-4, relative to what tells one image's features from the other's."""
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    error = np.linalg.norm(np.asarray(ours) - theirs)
    assert error < 1e-4 * np.linalg.norm(theirs[0] - theirs[1])


@pytest.mark.parametrize("shape", [(33, 47, 3), (299, 299, 3), (64, 64, 1)])
def test_features_are_the_packages(extractor, reference, state, shape):
    images = draw(2, *shape)
    images[1] //= 4
    features = jax.jit(extractor.apply)(extractor.params, images)
    images = np.broadcast_to(images, (2, *shape[:2], 3))  # the grey ones
    for name, theirs in torch_fidelity_features(reference, images).items():
        assert_close(getattr(features, name), theirs)
    if shape[0] == 299:
        assert_close(features.pooled, pytorch_fid_pooled(state, images))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (33, 47), (256, 256), (299, 299), (640, 427)])
def test_resize_is_tensorflows(size):
    images = draw(1, *size, 2).astype(np.float32)
    ours = np.asarray(resize(jnp.asarray(images)))
    np.testing.assert_allclose(ours, torch_fidelity_resized(images), rtol=0, atol=1e-4)


def test_another_files_bytes_are_refused(file, extractor, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"inception: .*not 6726825d; give .*any_fingerprint=True"):
        load_inception(file)
    content = bytearray(file.read_bytes())
    monkeypatch.setattr(inception_files, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    assert load_inception(file).fingerprint == extractor.fingerprint
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"inception: .*damaged\.pth is another file .*or a damaged"
    ):
        load_inception(damaged)


def test_fingerprint_is_of_tensors_and_not_of_the_format(state, extractor, tmp_path):
    assert extractor.kind == "inception" and extractor.image_shape is None
    assert extractor.name == "weights.pth" and len(extractor.fingerprint) == 16
    # As files without PyTorch's counts.
    state = {k: x for k, x in state.items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "same.safetensors"
    safetensors.torch.save_file(state, path)
    assert load_inception(path, any_fingerprint=True).fingerprint == extractor.fingerprint
    bias = state["Mixed_7c.branch_pool.bn.bias"].clone()
    bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    safetensors.torch.save_file(state | {"Mixed_7c.branch_pool.bn.bias": bias}, path)
    assert load_inception(path, any_fingerprint=True).fingerprint != extractor.fingerprint


def test_tensors_that_do_not_fit_are_refused_at_once(state, tmp_path):
    state = dict(state, **{"fc.bias": torch.zeros(1000), "AuxLogits.fc.bias": torch.zeros(3)})
    del state["Mixed_6b.branch7x7_2.conv.weight"]
    path = tmp_path / "others.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError) as error:
        load_inception(path, any_fingerprint=True)
    message = str(error.value)
    assert message.startswith("inception: 3 tensors of")
    assert "Mixed_6b.branch7x7_2.conv.weight is missing" in message
    assert "AuxLogits.fc.bias is extra" in message
    assert "fc.bias has shape (1000,), expected (1008,)" in message


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"inception: there is no file .*; give pytorch-fid"
    ):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("404: Not Found")
    for accept in (False, True):
        with pytest.raises(ValueError, match=r"inception: .*text\.pth .*give pytorch-fid's"):
            load_inception(tmp_path / "text.pth", any_fingerprint=accept)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.uint8), draw(8, 8, 3)]
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"images: Inception takes .* of uint8, .* got"):
        inception_features({}, images)
