"""Class agreement and its command, against scikit-learn used directly."""

import gzip
import struct

import numpy as np
import pytest
from absl.testing import flagsaver
from sklearn.svm import SVC

from lasad_jax import evaluate
from lasad_jax.config import DataConfig
from lasad_jax.data import load_images
from lasad_jax.evaluation.agreement import class_agreement


@pytest.fixture(scope="module")
def digits():
    return load_images(DataConfig(), "train"), load_images(DataConfig(), "test")


def test_real_digits_agree_as_scikit_learn_says(digits):
    train, test = digits
    oracle = SVC().fit(train.images.reshape(-1, 64) / 255.0, train.labels)
    expected = oracle.score(test.images.reshape(-1, 64) / 255.0, test.labels)
    got = class_agreement(test.images, test.labels, train)
    assert isinstance(got, float) and got == expected > 0.97


def test_agreement_falls_with_wrong_labels_and_noise(digits):
    train, test = digits
    assert class_agreement(test.images, (test.labels + 1) % 10, train) < 0.02
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    assert class_agreement(noise, np.arange(200) % 10, train) < 0.25


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8, 1)), np.zeros(2, int), "uint8.*float64"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), r"\(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, int), "M > 0"),
        (np.zeros((2, 4, 16, 1), np.uint8), np.zeros(2, int), "4 x 16 x 1.*8 x 8 x 1"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, int), r"\(2,\).*\(3,\)"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2), "integers.*float64"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.array([3, 10]), "class 10"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(digits, images, labels, message):
    with pytest.raises(ValueError, match=message):
        class_agreement(images, labels, digits[0])


@pytest.mark.parametrize(
    ("split", "ceiling"), [("train", "355, test"), ("test", "1442, train"), ("all", None)]
)
def test_the_report_gives_agreement_count_and_ceiling(tmp_path, digits, split, ceiling):
    train, test = digits
    np.savez(tmp_path / "s.npz", test.images[:50], test.labels[:50])
    lines = evaluate.report(str(tmp_path / "s.npz"), "digits", split=split).splitlines()
    assert lines[0].split() == ["images", "50"]
    assert lines[1].startswith("class agreement") and float(lines[1].split()[-1]) > 0.95
    assert len(lines) == (3 if ceiling else 2)
    if split == "train":
        assert lines[2].split()[2] == f"{class_agreement(test.images, test.labels, train):.4f}"
    if ceiling:
        assert ceiling in lines[2]


def test_the_command_reads_idx_files(tmp_path, capsys, digits):
    for prefix, part in zip(("train", "t10k"), digits, strict=True):
        for name, array in (("images-idx3", part.images[..., 0]), ("labels-idx1", part.labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = gzip.compress(header + array.astype(np.uint8).tobytes())
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(content)
    np.savez(tmp_path / "s.npz", digits[1].images, digits[1].labels)
    samples = str(tmp_path / "s.npz")
    flags = {"samples": samples, "source": "idx", "directory": str(tmp_path), "split": "train"}
    with flagsaver.as_parsed(**flags):
        evaluate.main()
    assert capsys.readouterr().out.strip() == evaluate.report(samples, "digits")


def test_unreadable_samples_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--samples=.*absent.npz"):
        evaluate.report(str(tmp_path / "absent.npz"), "digits")
    np.savez(tmp_path / "bare.npz", np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"bare.npz lacks arr_1"):
        evaluate.report(str(tmp_path / "bare.npz"), "digits")
    np.save(tmp_path / "one.npy", np.zeros((2, 8, 8, 1), np.uint8))
    (tmp_path / "text.npz").write_bytes(b"not an archive")
    (tmp_path / "half.npz").write_bytes((tmp_path / "bare.npz").read_bytes()[:150])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "text.npz", "half.npz", "empty.npz"):
        with pytest.raises(ValueError, match=rf"{name} is no whole \.npz"):
            evaluate.report(str(tmp_path / name), "digits")
