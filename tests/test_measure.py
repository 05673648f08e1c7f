"""Features over devices, and the numbers made of them, against plain NumPy and SciPy."""

import jax
import numpy as np
import pytest
import scipy.linalg
from evaluating import CLASSES, DIM, SHAPE, SPATIAL, random_images, tiny_extractor

from lasad_jax.evaluation.extract import BLOCK, ArrayImages, Extraction, MadeImages
from lasad_jax.evaluation.measure import (
    METRICS,
    Reference,
    check_count,
    choose_metrics,
    measure,
    scoring_places,
    see,
)

COUNT = 1201  # no multiple of anything


@pytest.fixture(scope="module")
def extraction():
    return Extraction(tiny_extractor(), per_device=64)


def features_of(images):
    """By the network alone, at once."""
    extractor = tiny_extractor()
    return jax.device_get(extractor.apply(extractor.params, images))


def reference_of(seen):
    return Reference(
        "real", "", "train", seen.count, seen.pooled.finish(), seen.spatial.finish(), seen.kept
    )


def test_features_come_in_order_in_blocks_of_one_size(extraction):
    images, asked = random_images(COUNT), []

    def make(first, last):
        asked.append((first, last))
        return images[first:last]

    blocks = list(extraction(MadeImages(COUNT, SHAPE, make)))
    assert [first for first, _ in blocks] == [0, BLOCK, 2 * BLOCK]
    assert asked == sorted(asked) and asked[-1][1] == COUNT
    for got, expected in zip(
        zip(*(features for _, features in blocks), strict=True), features_of(images), strict=True
    ):
        assert len(np.concatenate(got)) == COUNT
        np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-5, atol=1e-6)


def test_any_number_of_devices_gives_the_same_numbers():
    images, labels = random_images(BLOCK + 101, seed=1), np.arange(BLOCK + 101) % CLASSES
    values = []
    for devices in (1, 3, 8):
        extraction = Extraction(tiny_extractor(), devices=jax.devices()[:devices], per_device=32)
        real = reference_of(see(extraction, ArrayImages(images[:150] // 2)))
        seen = see(extraction, ArrayImages(images), labels, metrics=METRICS)
        values.append(measure(seen, real, METRICS))
    assert len(values[0]) == 9
    assert values[0] == values[1] == values[2]


def test_the_numbers_are_those_of_their_definitions(extraction):
    real_images, fake_images = random_images(200, seed=3), random_images(COUNT, seed=4, high=200)
    labels = np.random.default_rng(5).integers(0, CLASSES, COUNT)
    real = reference_of(see(extraction, ArrayImages(real_images)))
    seen = see(extraction, ArrayImages(fake_images), labels, metrics=METRICS)
    values = measure(seen, real, METRICS)
    assert list(values) == [
        "fid",
        "sfid",
        "inception_score",
        "inception_score_std",
        "precision",
        "recall",
        "kid",
        "kid_std",
        "class_agreement",
    ]

    a, b = features_of(real_images), features_of(fake_images)
    for name, x, y in (("fid", a.pooled, b.pooled), ("sfid", a.spatial, b.spatial)):
        x, y = x.astype(np.float64), y.astype(np.float64)
        root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
        shift = np.sum((x.mean(0) - y.mean(0)) ** 2)
        expected = shift + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
        np.testing.assert_allclose(values[name], expected, rtol=1e-5)

    p = np.exp(b.logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in (p[i * COUNT // 10 : (i + 1) * COUNT // 10] for i in range(10)):
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), 1))))
    np.testing.assert_allclose(values["inception_score"], np.mean(scores), rtol=1e-5)
    np.testing.assert_allclose(values["inception_score_std"], np.std(scores), rtol=1e-3)
    assert values["class_agreement"] == np.mean(b.logits.argmax(1) == labels)

    distance = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1)
    radii = lambda x: np.sort(distance(x, x), axis=1)[:, 3]
    near = distance(a.pooled, b.pooled)
    precision = np.mean(np.any(near <= radii(a.pooled)[:, None], axis=0))
    recall = np.mean(np.any(near <= radii(b.pooled)[None], axis=1))
    np.testing.assert_allclose([values["precision"], values["recall"]], [precision, recall], 5e-3)


def test_images_of_one_distribution_are_nearer_than_others(extraction):
    real = reference_of(see(extraction, ArrayImages(random_images(200, seed=6))))
    metrics = ("fid", "sfid", "precision_recall", "kid")
    alike, dark = (
        measure(see(extraction, ArrayImages(random_images(200, seed=7, high=high))), real, metrics)
        for high in (256, 120)
    )
    for name in ("fid", "sfid", "kid"):
        assert alike[name] < dark[name] / 5, name
    assert alike["recall"] > dark["recall"] + 0.2


def test_a_file_sorted_by_class_scores_as_a_mixed_one(extraction):
    images = random_images(2000, seed=8)
    seen_as = features_of(images).logits.argmax(1)
    kinds = np.stack([images[seen_as == kind][:200] for kind in (0, 1)])
    score = lambda images, labels: measure(
        see(extraction, ArrayImages(images), labels, metrics=("inception_score",)),
        None,
        ("inception_score",),
    )["inception_score"]
    order, labels = kinds.reshape(-1, *SHAPE), np.repeat([0, 1], 200)
    mixed = score(kinds.swapaxes(0, 1).reshape(-1, *SHAPE), np.tile([0, 1], 200))
    assert score(order, labels) == pytest.approx(mixed, rel=0.05)
    assert score(order, None) < 0.8 * mixed
    assert scoring_places(np.array([0, 1, 0, 1])) is None
    assert sorted(scoring_places(np.array([0, 0, 1, 2]))) == [0, 1, 2, 3]


def test_kept_images_are_some_of_each_stretch_and_always_the_same(extraction):
    images = random_images(COUNT, seed=10)
    kept = [see(extraction, ArrayImages(images), most_kept=200).kept for _ in range(2)]
    assert kept[0].shape == (200, DIM)
    np.testing.assert_array_equal(*kept)
    pooled = features_of(images).pooled
    rows = [int(np.argmin(np.abs(pooled - row).sum(1))) for row in kept[0]]
    assert rows == sorted(rows)
    assert np.all(np.histogram(rows, 4, (0, COUNT))[0] > 25)


def test_too_few_images_are_refused_by_number_and_remedy(extraction):
    dims = extraction.dims(SHAPE)
    assert dims == (DIM, SPATIAL, CLASSES)
    check_count(DIM + 1, dims, ("fid",))
    message = r"num: 6 are too few for fid: .*6 features .* below 7 images.*metrics=kid"
    with pytest.raises(ValueError, match=message):
        check_count(DIM, dims, ("fid", "kid"), field="num")
    with pytest.raises(ValueError, match="8 are too few for sfid"):
        check_count(SPATIAL, dims, METRICS)
    check_count(2, dims, METRICS, force=True)
    with pytest.raises(ValueError, match="1 are too few"):
        check_count(1, dims, METRICS, force=True)


def test_metrics_that_cannot_be_had_are_left_out_or_refused():
    all_there = {"kind": "classifier", "labelled": True, "spatial": True, "images": True}
    assert choose_metrics(None, **all_there) == METRICS
    assert choose_metrics(["kid", "fid"], **all_there) == ("fid", "kid")
    for change, lost, reason in (
        ({"kind": "inception"}, {"class_agreement"}, "takes a classifier"),
        ({"labelled": False}, {"class_agreement"}, "arr_1"),
        ({"spatial": False}, {"sfid"}, "no mu_s"),
        ({"images": False}, {"precision_recall", "kid"}, "no images"),
    ):
        left = choose_metrics(None, **all_there | change)
        assert set(METRICS) - set(left) == lost
        with pytest.raises(ValueError, match=f"no {min(lost)}: .*{reason}"):
            choose_metrics([min(lost)], **all_there | change)
    with pytest.raises(ValueError, match="'psnr' is not one of fid, "):
        choose_metrics(["psnr"], **all_there)


def test_images_of_another_shape_are_refused(extraction):
    with pytest.raises(ValueError, match="images are 4 x 4 x 3, but tiny was trained on 4 x 5 x 3"):
        extraction(ArrayImages(random_images(3, shape=(4, 4, 3))))
