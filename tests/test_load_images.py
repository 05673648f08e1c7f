"""Whole sources in memory: sizes, and what happens to unreadable images."""

import numpy as np
import pytest
from absl import logging
from source_cases import folder, write

from lasad_jax.data import load_images


def test_a_folder_is_loaded_at_its_size(tmp_path):
    for value in range(30):
        write(tmp_path / f"class{value % 2}" / f"{value}.png", value, (8 + value, 20))
    data = folder(tmp_path, image_size=(6, 7))
    train, test = (
        load_images(data, split, channels=3, progress=True) for split in ("train", "test")
    )
    assert len(train.labels) + len(test.labels) == 30 and train.num_classes == 2
    for images in (train, test):
        assert images.images.shape[1:] == (6, 7, 3) and images.images.dtype == np.uint8
        assert images.labels.dtype == np.int32 and images.class_names == ("class0", "class1")
        np.testing.assert_array_equal(images.images[:, 0, 0, 0] % 2, images.labels)
    assert load_images(data, "test", size=(3, 3)).images.shape[1:] == (3, 3, 1)
    with pytest.raises(
        ValueError, match=r"data\.image_size is \(0, 0\), but class\d/.* is \d+ x 20"
    ):
        load_images(folder(tmp_path), "train")


def test_unreadable_images_are_left_out_up_to_a_share(tmp_path, monkeypatch):
    for value in range(50):
        write(tmp_path / "train" / f"{value:02d}.png", value)
    write(tmp_path / "test" / "1.png")
    (tmp_path / "train" / "07.png").write_bytes(b"broken")
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    got = load_images(folder(tmp_path), "train", channels=3, max_unreadable=0.02)
    assert got.images[:, 0, 0, 0].tolist() == [value for value in range(50) if value != 7]
    assert len(got.labels) == 49 and len(warnings) == 1
    assert "1 of 50 images are unreadable" in warnings[0]
    assert "train/07.png: not an image" in warnings[0]
    for value in range(20, 45):
        (tmp_path / "train" / f"{value}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"26 of 50 images are unreadable, more") as caught:
        load_images(folder(tmp_path), "train", max_unreadable=0.5)
    assert str(caught.value).count("not an image") == 20 and "and 6 more" in str(caught.value)
    assert "train/07.png" in str(caught.value) and len(warnings) == 1
    (tmp_path / "test" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable images in split 'test'"):
        load_images(folder(tmp_path), "test", max_unreadable=1)


def test_one_unreadable_image_of_few_is_too_many_by_default(tmp_path):
    for value in range(50):
        write(tmp_path / f"{value:02d}.png", value)
    (tmp_path / "07.png").write_bytes(b"")
    (tmp_path / "08.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unreadable, more than the share of 0\.001"):
        load_images(folder(tmp_path), "train")
