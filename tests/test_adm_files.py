"""Files of ADM's evaluator, exchanged with NumPy's own reading and writing."""

import itertools
import zipfile

import numpy as np
import pytest

from lasad_jax.evaluation.moments import Moments
from lasad_jax.interop import adm_files, npz_members
from lasad_jax.interop.adm_files import (
    Statistics,
    open_images,
    read_images,
    read_statistics,
    write_statistics,
)
from lasad_jax.sampling.pictures import write_npz


def moments(dim, count=0, seed=0):
    rng = np.random.default_rng(seed)
    covariance = np.cov(rng.normal(size=(2 * dim + 1, dim)), rowvar=False).reshape(dim, dim)
    return Moments(count, rng.normal(size=dim), covariance)


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_same(got, expected):
    assert got.count == expected.count
    assert got.mean.dtype == got.covariance.dtype == np.float64
    np.testing.assert_array_equal(got.mean, expected.mean)
    np.testing.assert_array_equal(got.covariance, expected.covariance)


@pytest.mark.parametrize("spatial", [None, moments(3, 70, seed=1)])
@pytest.mark.parametrize("count", [0, 70])
def test_statistics_come_back(tmp_path, spatial, count):
    spatial = spatial and spatial._replace(count=count)
    write_statistics(tmp_path / "new" / "a.npz", Statistics(moments(5, count), spatial))
    got = read_statistics(tmp_path / "new" / "a.npz")
    assert_same(got.pooled, moments(5, count))
    if spatial is None:
        assert got.spatial is None
    else:
        assert_same(got.spatial, spatial)
    with np.load(tmp_path / "new" / "a.npz") as arrays:
        names = ["mu", "sigma"] + ["mu_s", "sigma_s"] * (spatial is not None)
        assert sorted(arrays) == sorted(names + ["count"] * (count > 0))
        np.testing.assert_array_equal(arrays["sigma"], moments(5).covariance)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics_of_others_are_read_without_their_images(tmp_path, save, monkeypatch):
    pooled, spatial = moments(6), moments(2, seed=1)
    save(
        tmp_path / "a.npz",
        arr_0=images(9, 4, 4, 3),
        mu=pooled.mean.astype(np.float32),
        sigma=pooled.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )
    opened = []
    plain = zipfile.ZipFile.open
    spy = lambda self, name, *args, **kwargs: (opened.append(name), plain(self, name))[1]
    monkeypatch.setattr(zipfile.ZipFile, "open", spy)
    got = read_statistics(tmp_path / "a.npz")
    assert sorted(opened) == ["mu.npy", "mu_s.npy", "sigma.npy", "sigma_s.npy"]
    assert_same(got.pooled, pooled._replace(mean=pooled.mean.astype(np.float32).astype(float)))
    assert_same(got.spatial, spatial)


def test_a_covariance_in_float32_is_made_symmetric(tmp_path):
    covariance = moments(4).covariance.astype(np.float32)
    covariance[0, 1] *= 1 + 1e-6
    assert covariance[0, 1] != covariance[1, 0]
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=covariance)
    got = read_statistics(tmp_path / "a.npz").pooled.covariance
    np.testing.assert_array_equal(got, got.T)
    np.testing.assert_allclose(got, covariance, rtol=1e-5)


def test_statistics_with_images_are_a_reference_of_adm(tmp_path):
    """Which has images to stream (from whichever form NumPy gave them) beside statistics."""
    x = images(150, 4, 5, 3)
    np.savez_compressed(tmp_path / "in.npz", x)
    statistics = Statistics(moments(3, 1000), moments(2, 1000))
    write_statistics(tmp_path / "a.npz", statistics, images=open_images(tmp_path / "in.npz"))
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], x)
        np.testing.assert_array_equal(arrays["mu_s"], statistics.spatial.mean)
    assert_same(read_statistics(tmp_path / "a.npz").pooled, statistics.pooled)
    np.testing.assert_array_equal(read_images(tmp_path / "a.npz")[0], x)


def test_the_same_statistics_make_the_same_bytes_and_a_failed_write_leaves_none(tmp_path):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    for path in (a, b):
        write_statistics(path, Statistics(moments(4, 9), None))
    assert a.read_bytes() == b.read_bytes()
    # Images that turn out to be damaged half-way.
    np.savez(tmp_path / "in.npz", images(200, 8, 8, 3))
    stored = open_images(tmp_path / "in.npz")
    data = bytearray((tmp_path / "in.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "in.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"no whole \.npz"):
        write_statistics(a, Statistics(moments(4, 50), None), images=stored)
    assert a.read_bytes() == b.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "b.npz", "in.npz"}


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": None}, r"file has \['mu_s', 'sigma', 'sigma_s'\] among"),
        ({"sigma_s": None}, r"\['mu', 'mu_s', 'sigma'\]"),
        ({"mu": np.zeros(4)}, r"mu must be \(D,\) and sigma \(D, D\), got shapes \(4,\) and \(3"),
        ({"sigma_s": np.eye(3)}, r"mu_s must be \(D,\) and sigma_s"),
        ({"mu": np.zeros((1, 3))}, r"shapes \(1, 3\)"),
        ({"mu": np.array([0, np.nan, 0])}, "mu holds values that are not finite"),
        ({"sigma_s": np.diag([1, np.inf])}, "sigma_s holds values that are not finite"),
        ({"sigma": np.eye(3) + np.eye(3, k=1)}, "sigma must be symmetric, but differs by up to 1"),
        ({"sigma": np.eye(3, dtype=int)}, "sigma must be of floats, got int64"),
        ({"count": np.ones(2, int)}, "count must be a whole number"),
        ({"mu": np.array([None, 1, 2])}, "Object arrays cannot be loaded"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, change, message):
    arrays = {k: v for k, v in (GOOD | change).items() if v is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        read_statistics(tmp_path / "a.npz", field="--reference")
    assert str(error.value).startswith(f"--reference={tmp_path}/a.npz: ")


def test_images_are_no_statistics_and_the_other_way_round(tmp_path):
    np.savez(tmp_path / "a.npz", images(2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"none among \['arr_0'\]; its images"):
        read_statistics(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **GOOD)
    with pytest.raises(ValueError, match=r"has only \['mu', 'mu_s', 'sigma', 'sigma_s'\]"):
        open_images(tmp_path / "a.npz")


def test_wrong_statistics_are_not_written(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="of 5 and 6 images"):
        write_statistics(path, Statistics(moments(3, 5), moments(2, 6)))
    with pytest.raises(ValueError, match="mu_s holds values that are not finite"):
        bad = moments(2)._replace(mean=np.full(2, np.nan))
        write_statistics(path, Statistics(moments(3), bad))
    with pytest.raises(ValueError, match="sigma must be symmetric"):
        bad = moments(2)._replace(covariance=np.array([[1.0, 0.5], [0.0, 1.0]]))
        write_statistics(path, Statistics(bad, None))
    assert not list(tmp_path.iterdir())


SAVES = {
    "stored": np.savez,
    "deflated": np.savez_compressed,
    "ours": lambda path, x, labels: write_npz(path, [x], labels),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("skip", [2**24, 1000])
def test_images_in_batches(tmp_path, save, skip, monkeypatch):
    monkeypatch.setattr(adm_files, "_SKIP", skip)
    x, labels = images(83, 9, 7, 3), np.arange(83)
    SAVES[save](tmp_path / "a.npz", x, labels)
    stored = open_images(tmp_path / "a.npz")
    assert stored.shape == x.shape
    np.testing.assert_array_equal(stored.labels, labels)
    for size, (start, stop) in itertools.product((1, 10, 83, 100), ((0, 83), (31, 60), (83, 83))):
        batches = list(stored.batches(size, start, stop))
        assert [len(b) for b in batches] == [min(size, stop - i) for i in range(start, stop, size)]
        assert all(b.dtype == np.uint8 for b in batches)
        np.testing.assert_array_equal(np.concatenate([x[:0], *batches]), x[start:stop])
    got, got_labels = read_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(got_labels, labels)


def test_no_more_than_a_batch_is_read_at_a_time(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images(500, 8, 8, 3))
    read = []
    plain = npz_members.read_bytes
    spy = lambda file, number: (read.append(number), plain(file, number))[1]
    monkeypatch.setattr(adm_files, "read_bytes", spy)
    stored = open_images(tmp_path / "a.npz")
    assert stored.labels is None
    next(stored.batches(7))
    assert read == [64 * 192, 7 * 192]


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (1, 1, 9, 3), (70, 2, 2, 1)])
def test_shapes_that_are_images(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images(*shape))
    assert read_images(tmp_path / "a.npz")[0].shape == shape
    # A model that collapsed may draw black only.
    np.savez(tmp_path / "a.npz", np.zeros(shape, np.uint8))
    assert not read_images(tmp_path / "a.npz")[0].any()


X = images(5, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": X / np.float32(255)}, r"got float32; they seem to be in \[0, 1\].*x \* 255"),
        ({"arr_0": X / 127.5 - 1}, r"float64; they seem to be in \[-1, 1\]"),
        ({"arr_0": X.astype(np.float32)}, "got float32; write uint8"),
        ({"arr_0": X.astype(int)}, "got int64; write uint8"),
        ({"arr_0": X // 128}, "hold only 0 and 1"),
        ({"arr_0": X[0]}, r"\(images, height, width, channels\).*got \(8, 8, 3\)"),
        ({"arr_0": X[:0]}, r"none of them 0, got \(0, 8, 8, 3\)"),
        ({"arr_0": X.transpose(0, 3, 1, 2).copy()}, r"got \(5, 3, 8, 8\); move the channels"),
        ({"arr_0": images(5, 8, 8, 4)}, r"1 or 3 channels, got \(5, 8, 8, 4\)$"),
        ({"arr_0": np.asfortranarray(X)}, "Fortran order"),
        ({"arr_0": X.astype(object)}, "got object"),
        ({"arr_0": X, "arr_1": np.arange(4)}, r"must be integers \(5,\).*int64 of shape \(4,\)"),
        ({"arr_0": X, "arr_1": np.ones(5)}, "got float64"),
    ],
)
def test_wrong_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        open_images(tmp_path / "a.npz", field="--samples")
    assert str(error.value).startswith(f"--samples={tmp_path}/a.npz: ")


def test_ranges_outside_the_file_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", X)
    stored = open_images(tmp_path / "a.npz")
    for size, start, stop in ((0, 0, 5), (2, -1, 5), (2, 3, 2), (2, 0, 6)):
        with pytest.raises(ValueError, match="holds images 0 to 4"):
            stored.batches(size, start, stop)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(tmp_path, save):
    path = tmp_path / "a.npz"
    read_all = lambda: [list(open_images(path).batches(10)), read_statistics(path)]
    with pytest.raises(FileNotFoundError, match=r"samples=.*a.npz: there is no such file"):
        read_all()
    save(path, arr_0=images(90, 8, 8, 3), **GOOD)
    read_all()
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:-30], b"no zip at all" * 9):
        path.write_bytes(damaged)
        for read in (open_images, read_statistics):
            with pytest.raises(ValueError, match=r"is no whole \.npz file"):
                read(path)
    # A byte that turned, in whichever place: of an array, or of what describes it.
    for place in np.random.default_rng(0).integers(0, len(data), 40):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        try:
            got = np.concatenate(list(open_images(path).batches(10)))
        except ValueError as error:
            assert "a.npz" in str(error)
        else:
            np.testing.assert_array_equal(got, images(90, 8, 8, 3))
