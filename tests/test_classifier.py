"""The classifier's features: its training, its file, and its network against PyTorch's layers."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType
from kernel_cases import precise_jit
from torch.nn import functional

from lasad_jax.config import DataConfig
from lasad_jax.data import ImageSet, load_images
from lasad_jax.evaluation import fit_classifier as fitting
from lasad_jax.evaluation.classifier import (
    choose_architecture,
    class_agreement,
    classifier_features,
    init_classifier,
)
from lasad_jax.evaluation.fit_classifier import (
    _shift,
    fit_classifier,
    fit_or_load,
    load_classifier,
    read_classifier,
    save_classifier,
)


@pytest.fixture(scope="module")
def digits():
    return load_images(DataConfig(), "train"), load_images(DataConfig(), "test")


@pytest.fixture(scope="module")
def trained(digits):
    return fit_classifier(*digits, name="digits", progress=False)


@pytest.fixture(scope="module")
def stripes():
    """Two classes, bright above or below, of 8 x 12 pixels; to train on and to try it on."""
    rng = np.random.default_rng(0)
    labels = np.arange(50, dtype=np.int32) % 2
    images = rng.integers(0, 200, (50, 8, 12, 1), dtype=np.uint8)
    images[labels == 0, :4] += 50
    images[labels == 1, 4:] += 50
    part = lambda rows: ImageSet(images[rows], labels[rows], ("above", "below"))
    return part(slice(0, 40)), part(slice(40, None))


def features(extractor, images):
    return jax.tree.map(np.asarray, jax.jit(extractor.apply)(extractor.params, images))


def test_it_knows_held_out_digits(digits, trained):
    _, test = digits
    logits = features(trained.extractor, test.images).logits
    assert np.mean(logits.argmax(1) == test.labels) == pytest.approx(trained.accuracy)
    assert trained.accuracy >= 0.98
    assert trained.class_names == tuple("0123456789") and trained.extractor.name == "digits"
    assert trained.extractor.kind == "classifier"
    assert trained.extractor.image_shape == (8, 8, 1)


def test_features_tell_real_digits_from_worse_ones(digits, trained):
    train, test = digits
    rng = np.random.default_rng(1)
    count = len(test.images)

    def distance(images):
        means = [features(trained.extractor, x).pooled.mean(0) for x in (train.images, images)]
        return np.sum((means[0] - means[1]) ** 2)

    noise = lambda scale: np.clip(
        test.images + rng.normal(0, scale, test.images.shape), 0, 255
    ).astype(np.uint8)
    distances = [distance(x) for x in (test.images, noise(60), noise(120))]
    assert 4 * distances[0] < distances[1] < distances[2]
    assert distance(test.images // 2) > 4 * distances[0]
    assert distance(test.images[test.labels < 3][:count]) > 4 * distances[0]


@pytest.mark.parametrize(
    ("image_shape", "pooled", "grid"),
    [
        ((8, 8, 1), 64, (4, 4)),
        ((8, 12, 1), 64, (4, 6)),
        ((17, 9, 3), 64, (7, 5)),
        ((28, 28, 1), 128, (7, 7)),
        ((21, 30, 3), 128, (7, 7)),
        ((50, 48, 1), 128, (7, 7)),
    ],
)
def test_features_are_those_of_pytorchs_layers(image_shape, pooled, grid):
    architecture = choose_architecture(image_shape, 5)
    rng = np.random.default_rng(image_shape)
    template = jax.eval_shape(lambda key: init_classifier(architecture, key), jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), template)
    images = rng.integers(0, 256, (3, *image_shape), dtype=np.uint8)
    got = jax.jit(classifier_features, static_argnums=0)(architecture, params, images)
    assert got.pooled.shape == (3, pooled)
    assert got.spatial.shape == (3, 7 * grid[0] * grid[1])
    assert got.logits.shape == (3, 5)
    for mine, theirs in zip(got, torch_features(architecture, params, images, grid), strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def torch_features(architecture, params, images, grid):
    """The same in float64, written with PyTorch's layers."""
    flat = flatten_dict(params, sep=".")
    weights = {name: torch.tensor(x, dtype=torch.float64) for name, x in flat.items()}

    def conv(name, x, stride=1):
        kernel = weights[f"{name}.kernel"].permute(3, 2, 0, 1)
        pad = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel.shape[2] - side, 0)
            pad += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, pad), kernel, weights[f"{name}.bias"], stride)

    def norm(name, x):
        scale, bias = weights[f"{name}.scale"], weights[f"{name}.bias"]
        return functional.group_norm(x, 8, scale, bias, eps=1e-6).relu()

    x = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2) / 127.5 - 1
    x = conv("stem", x, architecture.stride)
    for index in range(len(architecture.widths)):
        block, stride = f"block_{index}", 2 if index else 1
        y = norm(f"{block}.norm_1", x)
        if index:
            x = conv(f"{block}.shortcut", y, stride)
        y = norm(f"{block}.norm_2", conv(f"{block}.conv_1", y, stride))
        x = x + conv(f"{block}.conv_2", y)
        if index == {2: 0, 3: 1}[len(architecture.widths)]:
            spatial = functional.adaptive_avg_pool2d(x[:, :7], grid).permute(0, 2, 3, 1)
    pooled = norm("norm", x).mean((2, 3))
    logits = pooled @ weights["head.kernel"] + weights["head.bias"]
    return [x.numpy() for x in (pooled, spatial.flatten(1), logits)]


def test_an_images_features_do_not_depend_on_its_batch(digits, trained):
    images = digits[1].images[:9]
    together = features(trained.extractor, images)
    for index in range(0, 9, 4):
        alone = features(trained.extractor, images[index : index + 1])
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[index], rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_parameters_whatever_the_mesh(stripes, monkeypatch):
    step = precise_jit(fitting._step, static_argnums=0, donate_argnums=(1, 2))
    monkeypatch.setattr(fitting, "_compiled_step", lambda platform: step)
    fit = lambda seed, progress: fit_classifier(*stripes, seed=seed, epochs=3, progress=progress)
    first, other = fit(3, False), fit(4, False)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        again = fit(3, True)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.trained_on == other.trained_on
    assert first.accuracy == again.accuracy


@pytest.mark.parametrize("shape", [(8, 12, 1), (17, 9, 3)])
def test_images_are_shifted_by_up_to_an_eighth_with_their_edges_repeated(shape):
    images = np.random.default_rng(2).integers(0, 256, (150, *shape), dtype=np.uint8)
    shifted = np.asarray(_shift(jax.random.key(1), images))
    most = [shape[0] // 8, shape[1] // 8]
    padded = np.pad(images, [(0, 0), *((n, n) for n in most), (0, 0)], mode="edge")
    places = [(r, c) for r in range(2 * most[0] + 1) for c in range(2 * most[1] + 1)]
    windows = np.stack([padded[:, r : r + shape[0], c : c + shape[1]] for r, c in places])
    equal = (windows == shifted).all((2, 3, 4))
    assert (equal.sum(0) == 1).all() and (equal.sum(1) > 0).all()


def test_a_file_gives_the_classifier_back_bit_for_bit(tmp_path, trained):
    path = tmp_path / "new" / "c.safetensors"
    save_classifier(path, trained)
    again = read_classifier(path)
    jax.tree.map(np.testing.assert_array_equal, trained.params, again.params)
    for field in dataclasses.fields(trained):
        if field.name != "params":
            assert getattr(again, field.name) == getattr(trained, field.name)
    loaded = load_classifier(str(path))
    for name in ("kind", "name", "fingerprint", "image_shape"):
        assert getattr(loaded, name) == getattr(trained.extractor, name)
    content = path.read_bytes()
    save_classifier(path, again)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def test_every_parameter_and_the_architecture_show_in_the_fingerprint(trained):
    seen = {trained.fingerprint}
    for index, leaf in enumerate(jax.tree.leaves(trained.params)):
        leaves = list(jax.tree.leaves(trained.params))
        leaves[index] = leaf.copy()
        leaves[index].flat[-1] = np.nextafter(leaf.flat[-1], np.float32(9))
        params = jax.tree.unflatten(jax.tree.structure(trained.params), leaves)
        seen.add(dataclasses.replace(trained, params=params).fingerprint)
    architecture = dataclasses.replace(trained.architecture, stride=2)
    seen.add(dataclasses.replace(trained, architecture=architecture).fingerprint)
    assert len(seen) == len(jax.tree.leaves(trained.params)) + 2


def rewrite(path: Path, change) -> None:
    """Applies a function to a file's tensors and description, in place."""
    with safetensors.safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
        card = json.loads(file.metadata()["classifier"])
    change(tensors, card)
    safetensors.numpy.save_file(tensors, path, {"classifier": json.dumps(card)})


def flip(tensors, card):
    tensors["head.bias"][0] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "damaged"),
        (lambda tensors, card: tensors.pop("head.bias"), "head.bias is missing"),
        (lambda tensors, card: tensors.update(x=np.zeros(1)), "x is extra"),
        (lambda tensors, card: card["architecture"].update(num_classes=9), "head.bias has shape"),
        (lambda tensors, card: card["architecture"].update(depth=3), "depth"),
        (lambda tensors, card: card.pop("seed"), "seed"),
        (lambda tensors, card: card.pop("fingerprint"), "fingerprint"),
    ],
)
def test_damaged_files_are_refused(tmp_path, trained, change, message):
    path = tmp_path / "c.safetensors"
    save_classifier(path, trained)
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"^classifier: .*{message}"):
        load_classifier(path)


def test_other_files_are_refused(tmp_path, trained):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match="classifier: there is no file"):
        load_classifier(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"classifier: .*cannot be read"):
        load_classifier(path)
    save_classifier(path, trained)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"classifier: .*cannot be read"):
        load_classifier(path)
    safetensors.numpy.save_file({"x": np.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"classifier: .*no description"):
        load_classifier(path)
    for use in (load_classifier, lambda path: save_classifier(path, trained)):
        with pytest.raises(ValueError, match=r"classifier: .*\.safetensors"):
            use(tmp_path / "c.npz")


def test_a_stored_classifier_is_used_for_its_own_images_only(tmp_path, stripes):
    path = tmp_path / "c.safetensors"
    real, held_out = stripes
    options = {"epochs": 1, "progress": False}
    first = fit_or_load(path, real, held_out, name="stripes", seed=5, **options)
    content = path.read_bytes()
    again = fit_or_load(path, real, held_out, **options)
    assert (again.fingerprint, again.seed, again.name) == (first.fingerprint, 5, "stripes")
    swapped = real._replace(labels=1 - real.labels)
    turned = real._replace(images=real.images[:, ::-1])
    for other in (swapped, turned, real._replace(images=real.images[1:], labels=real.labels[1:])):
        with pytest.raises(ValueError, match=r"other images.*'stripes'.*remove the file") as error:
            fit_or_load(path, other, held_out, **options)
        assert first.trained_on in str(error.value)
    assert path.read_bytes() == content


def random_set(shape, labels):
    images = np.zeros((len(labels), *shape), np.uint8)
    return ImageSet(images, np.array(labels, np.int32), tuple("abc"[: max([0, *labels]) + 1]))


@pytest.mark.parametrize(
    ("real", "held_out", "message"),
    [
        (((7, 9, 1), [0, 1]), ((7, 9, 1), [0]), "7 x 9 .*8 pixels"),
        (((8, 8, 2), [0, 1]), ((8, 8, 2), [0]), "1 or 3 channels, got 2"),
        (((8, 8, 1), [0, 0]), ((8, 8, 1), [0]), "at least two"),
        (((8, 8, 1), [0, 1]), ((8, 9, 1), [0]), "8 x 9 x 1.*8 x 8 x 1"),
        (((8, 8, 1), [0, 1]), ((8, 8, 1), [1, 2]), "class 2"),
        (((8, 8, 1), [0, 1]), ((8, 8, 1), []), "got 2 and 0"),
        (((8, 8, 1), []), ((8, 8, 1), [0]), "got 0 and 1"),
    ],
)
def test_images_that_no_classifier_is_for_are_refused(tmp_path, real, held_out, message):
    with pytest.raises(ValueError, match=f"^classifier: .*{message}"):
        fit_or_load(tmp_path / "c.safetensors", random_set(*real), random_set(*held_out))


def test_other_images_epochs_and_paths_are_refused(tmp_path, stripes, trained):
    with pytest.raises(ValueError, match=r"8, 8, 1\).*uint8 of shape \(2, 8, 9, 1\)"):
        trained.extractor.apply(trained.params, np.zeros((2, 8, 9, 1), np.uint8))
    with pytest.raises(ValueError, match="float32 of shape"):
        trained.extractor.apply(trained.params, np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match="epochs: 0"):
        fit_classifier(*stripes, epochs=0)
    with pytest.raises(ValueError, match=r"classifier: .*\.safetensors"):
        fit_or_load(tmp_path / "c.npz", *stripes)


def test_agreement_is_the_share_of_right_classes():
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(37, 4)).astype(np.float32), rng.integers(0, 4, 37)
    right = sum(
        max(range(4), key=row.__getitem__) == k for row, k in zip(logits, labels, strict=True)
    )
    assert class_agreement(logits, labels) == pytest.approx(right / 37)
    assert class_agreement(logits, logits.argmax(1)) == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 4)), np.zeros(0, int), r"\(0, 4\)"),
        (np.zeros(4), np.zeros(4, int), r"got \(4,\)"),
        (np.zeros((2, 4)), np.zeros(3, int), r"\(2,\).*\(3,\)"),
        (np.zeros((2, 4)), np.zeros(2), "integers.*float64"),
        (np.zeros((2, 4)), np.array([0, 4]), "class 4.*0 to 3"),
        (np.zeros((2, 4)), np.array([-1, 3]), "class -1"),
    ],
)
def test_labels_that_fit_no_logits_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        class_agreement(logits, labels)
