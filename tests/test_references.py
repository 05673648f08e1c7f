"""What samples are compared with, and mix-ups that are refused."""

import dataclasses
import json
import types

import numpy as np
import pytest
from evaluating import DIM, SHAPE, SPATIAL, random_images, tiny_extractor
from PIL import Image

from lasad_jax.config import Config, DataConfig
from lasad_jax.data.images import load_images
from lasad_jax.data.sources import folder as folder_source
from lasad_jax.evaluation import evaluator as evaluator_module
from lasad_jax.evaluation import real_images
from lasad_jax.evaluation.evaluator import Evaluator, Samples
from lasad_jax.evaluation.extract import ArrayImages, Extraction
from lasad_jax.evaluation.features import Features
from lasad_jax.evaluation.image_files import FileImages, npz_fingerprint
from lasad_jax.evaluation.measure import see
from lasad_jax.evaluation.moments import Moments
from lasad_jax.evaluation.protocol import check_meaningful, check_protocol, split_of_file
from lasad_jax.evaluation.real_images import RealImages
from lasad_jax.evaluation.reference import reference_of_file, reference_of_split
from lasad_jax.interop.adm_files import Statistics, read_statistics, write_statistics
from lasad_jax.sampling.pictures import write_npz


@pytest.fixture(scope="module")
def inception():
    return Extraction(tiny_extractor("inception"), per_device=8)


@pytest.fixture(scope="module")
def classifier():
    return Extraction(tiny_extractor(), per_device=8)


def moments(dim, seed=0):
    rng = np.random.default_rng(seed)
    return Moments(0, rng.standard_normal(dim), np.cov(rng.standard_normal((dim, 99))))


def write_images(path, count=50, seed=0, **kwargs):
    images = random_images(count, seed)
    write_npz(path, [images], np.arange(count) % 3, **kwargs)
    return images


def write_both(path, images, statistics):
    """As ADM's: statistics of more images than there are."""
    pooled, spatial = statistics
    np.savez(
        path,
        arr_0=images,
        mu=pooled.mean,
        sigma=pooled.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )


# Files


def test_any_stretch_of_a_file_is_read(tmp_path):
    images = write_images(tmp_path / "a.npz", 200)
    file = FileImages("samples", tmp_path / "a.npz")
    assert len(file) == 200 and file.shape == SHAPE
    np.testing.assert_array_equal(file.labels, np.arange(200) % 3)
    for first, last in ((0, 7), (7, 130), (150, 151), (190, 200), (3, 90), (0, 200)):
        np.testing.assert_array_equal(file.read(first, last), images[first:last])


def test_fingerprints_are_of_the_content(tmp_path):
    for name, seed, comment in (("a", 0, ""), ("b", 0, "other"), ("c", 1, "")):
        write_images(tmp_path / f"{name}.npz", seed=seed, comment=comment)
    a, b, c = (npz_fingerprint("samples", tmp_path / f"{name}.npz") for name in "abc")
    assert a == b and a[0] != c[0] and a[1] == {"arr_0", "arr_1"}
    (tmp_path / "half.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:999])
    with pytest.raises(ValueError, match=r"samples=.*half\.npz is no whole \.npz"):
        npz_fingerprint("samples", tmp_path / "half.npz")
    with pytest.raises(FileNotFoundError, match=r"samples=.*no such file"):
        npz_fingerprint("samples", tmp_path / "absent.npz")


def test_statistics_of_a_file_stand_for_its_images_where_they_are_inceptions(
    tmp_path, inception, classifier
):
    images, given = random_images(60), (moments(DIM), moments(SPATIAL))
    path = tmp_path / "VIRTUAL_both.npz"
    write_both(path, images, given)
    reference = reference_of_file(path, "train", inception, shape=SHAPE, progress=False)
    np.testing.assert_allclose(reference.pooled.mean, given[0].mean)
    np.testing.assert_allclose(reference.spatial.covariance, given[1].covariance)
    assert reference.num_images == 0 and len(reference.kept) == 60

    # A classifier has other features: its own of the images.
    reference = reference_of_file(path, "train", classifier, shape=SHAPE, progress=False)
    own = see(classifier, ArrayImages(images))
    np.testing.assert_array_equal(reference.pooled.mean, own.pooled.finish().mean)
    assert reference.num_images == 60

    bare = tmp_path / "bare.npz"
    write_statistics(bare, Statistics(*given))
    reference = reference_of_file(bare, "train", inception, shape=SHAPE, progress=False)
    assert reference.kept is None
    with pytest.raises(ValueError, match="only --inception can be"):
        reference_of_file(bare, "train", classifier, shape=SHAPE, progress=False)


def test_references_that_do_not_fit_are_refused(tmp_path, inception):
    write_statistics(tmp_path / "wide.npz", Statistics(moments(DIM + 1), None))
    with pytest.raises(ValueError, match=f"mean of {DIM + 1} features, but Inception has {DIM}"):
        reference_of_file(tmp_path / "wide.npz", "train", inception, shape=SHAPE)
    write_images(tmp_path / "images.npz")
    with pytest.raises(ValueError, match="samples are 9 x 9 x 3 but the real images 4 x 5 x 3"):
        reference_of_file(tmp_path / "images.npz", "train", inception, shape=(9, 9, 3))
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"no images .*mu and sigma"):
        reference_of_file(tmp_path / "none.npz", "train", inception, shape=SHAPE)
    np.savez(tmp_path / "floats.npz", arr_0=random_images(9) / 255)
    with pytest.raises(ValueError, match=r"reference=.*floats\.npz.*must be uint8"):
        reference_of_file(tmp_path / "floats.npz", "train", inception, shape=SHAPE)


# Splits


def digits_extraction():
    shape = (8, 8, 1)
    projection = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    extractor = tiny_extractor(image_shape=shape)

    def apply(params, images):
        x = images.reshape(len(images), -1) @ params / 255
        return Features(x, x[:, :2], x[:, :3])

    return Extraction(dataclasses.replace(extractor, params=projection, apply=apply))


def test_features_of_a_split_are_taken_once(tmp_path, monkeypatch):
    extraction, real = digits_extraction(), RealImages(DataConfig(), 1)
    first = reference_of_split(real, "test", extraction, tmp_path, shape=(8, 8, 1), progress=False)
    expected = load_images(DataConfig(), "test").images
    assert first.num_images == len(expected) == len(first.kept)
    pooled = expected.reshape(len(expected), -1) @ extraction.extractor.params / 255
    np.testing.assert_allclose(first.pooled.covariance, np.cov(pooled.T), rtol=1e-4)
    (path,) = tmp_path.iterdir()
    np.testing.assert_array_equal(read_statistics(path).pooled.mean, first.pooled.mean)

    calls = []
    monkeypatch.setattr(Extraction, "_passes", lambda *args: calls.append(args) or iter(()))
    again = reference_of_split(real, "test", extraction, tmp_path, shape=(8, 8, 1), progress=False)
    assert again.fingerprint == first.fingerprint and not calls
    np.testing.assert_array_equal(again.pooled.covariance, first.pooled.covariance)
    np.testing.assert_array_equal(again.kept, first.kept)
    with pytest.raises(ValueError):  # nothing comes out of no passes
        reference_of_split(real, "train", extraction, tmp_path, shape=(8, 8, 1), progress=False)
    assert len(calls) == 1


def test_a_folders_fingerprint_is_of_names_and_content(tmp_path):
    def write(name, seed, split="train"):
        path = tmp_path / split / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(1, seed, (9, 9, 3))[0]).save(path)

    for i in range(3):
        write(f"{i}.png", i)
    write("held_out.png", 7, "test")
    data = DataConfig(source="folder", directory=str(tmp_path), image_size=(8, 8))
    prints = [RealImages(data, 3).fingerprint("train")]
    assert RealImages(data, 3).stream("train").read(1, 3).shape == (2, 8, 8, 3)
    write("1.png", 9)
    prints += [RealImages(data, 3).fingerprint("train")]
    write("3.png", 3)
    prints += [RealImages(data, 3).fingerprint("train"), RealImages(data, 1).fingerprint("train")]
    assert len(set(prints)) == 4


def test_a_folder_is_listed_once_and_not_read_whole_for_its_fingerprint(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for i in range(70):
            path = tmp_path / split / "cat" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random_images(1, i, (9, 9, 3))[0]).save(path)
    listed, read = [], []
    list_files, decode = folder_source._scan, folder_source.decode_image
    monkeypatch.setattr(folder_source, "_scan", lambda x: listed.append(x) or list_files(x))
    monkeypatch.setattr(
        folder_source,
        "decode_image",
        lambda *args, **how: read.append(args) or decode(*args, **how),
    )
    real = RealImages(
        DataConfig(source="folder", directory=str(tmp_path), image_size=(8, 8)), channels=3
    )
    fingerprint = real.fingerprint("train")
    assert len(read) == 64
    assert real.shape("train") == (8, 8, 3)
    everything = real.stream("train").read(0, 70)
    np.testing.assert_array_equal(everything, real.load("train").images)
    assert real.fingerprint("train") == fingerprint
    assert len(listed) == 1


def test_a_run_on_codes_is_compared_with_what_they_were_made_from(tmp_path, monkeypatch):
    images = DataConfig(source="folder", directory=str(tmp_path), image_size=(8, 12), fit="pad")
    stored = json.loads(json.dumps(dataclasses.asdict(images)))
    manifest = types.SimpleNamespace(job=types.SimpleNamespace(source=stored))
    monkeypatch.setattr(real_images, "read_manifest", lambda directory: manifest)
    tokenizer = types.SimpleNamespace(channels=3)
    monkeypatch.setattr(real_images, "load_tokenizer", lambda path: (tokenizer, {}))
    config = Config(data=DataConfig(source="codes", directory="codes"))
    assert real_images.of_run(config, tmp_path) == RealImages(images, 3)

    stored["directory"] = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"directory: .*gone, .*is gone; .*--source"):
        real_images.of_run(config, tmp_path)
    del stored["image_size"]
    with pytest.raises(ValueError, match=r"source: the codes in codes do not say .*--source"):
        real_images.of_run(config, tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"'codes', which is no folder.*--source"):
        real_images.of_run(config, tmp_path)
    pixels = Config(data=DataConfig())
    assert real_images.of_run(pixels, tmp_path) == RealImages(DataConfig(), 1)


# Mix-ups


@pytest.mark.parametrize(
    ("protocol", "split", "said"),
    [
        ("generation", "test", "VIRTUAL_imagenet256_labeled.*--protocol=reconstruction.*--force"),
        ("reconstruction", "train", "validation images that they.*--protocol=generation"),
    ],
)
def test_gfid_and_rfid_are_kept_apart(protocol, split, said):
    with pytest.raises(ValueError, match=f"protocol: '{protocol}' .*split '{split}'.*{said}"):
        check_protocol(protocol, split)
    check_protocol(protocol, split, force=True)
    check_protocol(protocol, {"train": "test", "test": "train"}[split])


@pytest.mark.parametrize(
    ("name", "told", "split"),
    [
        ("VIRTUAL_imagenet256_labeled.npz", None, "train"),
        ("imagenet_val_256.npz", None, "test"),
        ("val256x256.npz", None, "test"),
        ("ImageNet-Validation.npz", None, "test"),
        ("interval.npz", "train", "train"),
        ("mine.npz", "test", "test"),
        ("interval.npz", None, "reference_split: .*interval.npz.*--reference_split=train"),
        ("evaluation.npz", None, "reference_split"),
        ("VIRTUAL_imagenet256_labeled.npz", "test", "'test', but by its name .* 'train'"),
        ("imagenet_val.npz", "train", "'train', but by its name .* 'test'"),
    ],
)
def test_a_files_split_is_known_by_its_name_or_told(name, told, split):
    if split in ("train", "test"):
        assert split_of_file(f"train/{name}", told) == split
        return
    with pytest.raises(ValueError, match=split):
        split_of_file(name, told)


def test_inception_sees_nothing_in_small_or_grey_images():
    for shape in ((28, 28, 1), (256, 256, 1), (28, 64, 3)):
        with pytest.raises(ValueError, match=r"inception: images of .*leave --inception out"):
            check_meaningful("inception", shape)
        check_meaningful("inception", shape, force=True)
    for shape in ((32, 32, 3), (256, 256, 3)):
        check_meaningful("inception", shape)
    with pytest.raises(ValueError, match=r"256 x 64 x 3 are too large .*--inception=FILE"):
        check_meaningful("classifier", (256, 64, 3))
    for shape in ((28, 28, 1), (128, 64, 3)):
        check_meaningful("classifier", shape)


# All together, with networks of a few numbers


@pytest.fixture
def networks(monkeypatch):
    inception = lambda path, any_fingerprint: tiny_extractor("inception", name=path.name)
    trained = type("Trained", (), {"extractor": tiny_extractor(seed=1), "accuracy": 0.9})
    monkeypatch.setattr(evaluator_module, "load_inception", inception)
    monkeypatch.setattr(evaluator_module, "read_classifier", lambda path: trained)
    monkeypatch.setattr(evaluator_module, "check_meaningful", lambda *args, **kwargs: None)


def evaluator_of(tmp_path, **changes):
    def no_source():
        raise ValueError("source: none")

    (tmp_path / "classifier").touch()
    options = {
        "count": 50,
        "labelled": True,
        "cache": tmp_path,
        "real": no_source,
        "reference": tmp_path / "VIRTUAL_r.npz",
        "progress": False,
    }
    return Evaluator(SHAPE, **options | changes)


def test_the_two_kinds_of_features_are_kept_apart(tmp_path, networks):
    write_both(tmp_path / "VIRTUAL_r.npz", random_images(40, 5), (moments(DIM), moments(SPATIAL)))
    identity = {"step": 7, "parameters": "average ab", "seed": 3, "guidance": 1.5, "top_k": 9}
    write_images(tmp_path / "s.npz", comment=json.dumps(identity))
    samples = Samples.of_file(tmp_path / "s.npz")
    reports = {
        kind: evaluator_of(tmp_path, **{kind: tmp_path / kind}).measure(samples)
        for kind in ("inception", "classifier")
    }
    names = {kind: set(report.metrics) for kind, report in reports.items()}
    assert not names["inception"] & names["classifier"]
    assert {"fid_inception", "sfid_inception", "kid_std_inception"} < names["inception"]
    assert {"fid_classifier", "class_agreement"} < names["classifier"]
    assert "class_agreement" not in names["inception"]

    text = reports["classifier"].table()
    value = reports["classifier"].to_json()
    assert "FID (classifier)" in text and "FID (inception)" in reports["inception"].table()
    assert value["sampling"] == {"guidance": 1.5, "top_k": 9}
    assert value["checkpoint"] == {"step": 7, "parameters": "average ab", "seed": 3}
    assert value["reference"]["split"] == "train" and value["reference"]["num_images"] == 40
    assert value["reference"]["fingerprint"] == npz_fingerprint("r", tmp_path / "VIRTUAL_r.npz")[0]
    assert value["samples"]["num_images"] == 50 and value["protocol"] == "generation"
    assert value["features"] == {
        "kind": "classifier",
        "name": "tiny",
        "fingerprint": f"{1:016x}",
        "accuracy": 0.9,
    }
    for said in ("step 7", "guidance 1.5", "VIRTUAL_r.npz", "split train, 40 images", f"{1:016x}"):
        assert said in text, said
    assert "statistics of an unknown number" in reports["inception"].table()


def test_an_evaluation_refuses_before_it_looks_at_a_sample(tmp_path, networks):
    write_images(tmp_path / "VIRTUAL_r.npz")
    classifier = {"classifier": tmp_path / "classifier"}
    for match, changes in (
        (
            "protocol: 'reconstruction' with a reference of split 'train'",
            {"protocol": "reconstruction"},
        ),
        ("num: 7 are too few for sfid", {"count": 7, "count_field": "num"}),
        ("arr_1", {"labelled": False, "metrics": ["class_agreement"]}),
        ("source: none", {"reference": None}),
        ("source: none", {"classifier": None}),
        ("reference_split", {"reference": tmp_path / "unnamed.npz"}),
    ):
        write_images(tmp_path / "unnamed.npz")
        with pytest.raises(ValueError, match=match):
            evaluator_of(tmp_path, **classifier | changes)
    forced = evaluator_of(tmp_path, protocol="reconstruction", force=True, **classifier)
    write_images(tmp_path / "s.npz")
    report = forced.measure(Samples.of_file(tmp_path / "s.npz"))
    assert report.forced and "reconstruction (forced)" in report.table()
    no_reference = evaluator_of(
        tmp_path, reference=None, metrics=["class_agreement"], count=2, **classifier
    )
    report = no_reference.measure(Samples.of_file(tmp_path / "s.npz"))
    assert list(report.metrics) == ["class_agreement"] and report.reference is None
    assert "none (no metric takes one)" in report.table()
