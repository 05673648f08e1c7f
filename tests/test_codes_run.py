"""From a folder of images to pictures of a generator trained on their codes; what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from processes import command
from tiny import one_device_mesh, tiny_config
from tokenizing import (
    CLASSES,
    GRID,
    SIZE,
    VOCAB_SIZE,
    random_picture,
    tokenize,
    write_images,
    write_tokenizer,
)

from lasad_jax.interop.tokenizer_files import fingerprint, load_tokenizer
from lasad_jax.training import loop
from lasad_jax.training.generator_task import GeneratorTask
from lasad_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("codes_run")


@pytest.fixture(scope="module")
def codec(top):
    """Of the tokenizer in tokenizer.safetensors."""
    return write_tokenizer(top / "tokenizer.safetensors")


@pytest.fixture(scope="module")
def codes(top, codec):
    write_images(top / "images", 60)
    said = tokenize(
        f"--tokenizer={top / 'tokenizer.safetensors'}",
        f"--directory={top / 'images'}",
        "--image_size=8,12",
        f"--out={top / 'codes'}",
    )
    images = re.findall(r"(\w+): (\d+) images", said)
    assert sum(int(count) for _, count in images) == 60
    return top / "codes"


def generator(codes, *, model=(), data=(), **overrides):
    shape = {"vocab_size": VOCAB_SIZE, "num_classes": 3, "grid": GRID}
    return tiny_config(
        **{"steps": 3, "batch_size": 8, "eval_every": 3} | overrides,
        model=shape | dict(model),
        data={"source": "codes", "directory": str(codes)} | dict(data),
    )


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def changed(codes, tmp_path):
    """A copy of the codes, to be spoilt."""
    return shutil.copytree(codes, tmp_path / "changed")


@pytest.fixture(scope="module")
def trained(top, codes):
    """A run on codes that are gone since."""
    copy = shutil.copytree(codes, top / "short-lived")
    loop.train(generator(copy, sample_every=3), top / "run")
    shutil.rmtree(copy)
    return top / "run"


# Pictures


def sample(workdir, *flags, fails=False):
    return command("sample", f"--workdir={workdir}", *flags, fails=fails)


def read(path):
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


@pytest.fixture(scope="module")
def given(trained):
    """Pictures to complete, and their file."""
    rng = np.random.default_rng(5)
    images = np.stack([random_picture(rng, SIZE) for _ in range(5)])
    np.savez(trained / "given.npz", arr_0=images, arr_1=np.array([2, 0, 1, 1, 0]))
    return images, trained / "given.npz"


def test_training_leaves_colour_pictures(trained):
    assert "held_out_nats_per_token" in read_metrics(trained / "metrics.jsonl")[-1]
    with Image.open(trained / "samples" / "step_0000003.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[..., 0] != pixels[..., 2]).any()


def test_classes_are_asked_for_by_name_or_number(trained, given):
    _, path = given
    flags = ("--classes=cats,2", f"--complete={path}", "--rows=1", "--num=4")
    sample(trained, *flags, f"--out={trained / 'a'}")
    images, labels = read(trained / "a.npz")
    assert images.shape == (4, *SIZE, 3)
    assert images.dtype == np.uint8
    assert sorted(labels.tolist()) == [0, 0, 2, 2]
    assert (images[..., 0] != images[..., 2]).any()
    assert len({image.tobytes() for image in images}) == 4
    assert (trained / "a.png").exists()


def test_pictures_of_which_all_rows_are_kept_are_their_reconstructions(trained, given, codec):
    expected, path = given
    sample(trained, f"--complete={path}", "--rows=4", f"--out={trained / 'b'}")
    images, labels = read(trained / "b.npz")
    expected = codec.decode(codec.encode(expected), GRID)
    # Near ties and rounding, which the compiler's other settings here may decide otherwise.
    assert np.mean(np.abs(images.astype(int) - expected) > 1) < 0.01
    assert labels.tolist() == [2, 0, 1, 1, 0]


def test_pictures_to_complete_under_another_name_are_refused_in_a_line(trained, given):
    path = trained / "named.npz"
    np.savez(path, pictures=given[0])
    said = sample(trained, f"--complete={path}", "--rows=1", fails=True)
    assert "named.npz: images are expected as arr_0" in said and "['pictures']" in said


def test_a_class_that_does_not_exist_is_refused_in_a_line(trained):
    said = sample(trained, "--classes=cats,mice", fails=True)
    assert f"classes: 'mice' is no class; there are 0 to 2, named {', '.join(CLASSES)}" in said


# Refusals


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"grid": GRID[::-1]}, r"config\.model\.grid: \(6, 4\) .* set it to \(4, 6\)"),
        ({"vocab_size": 8}, r"config\.model\.vocab_size: 8 .* set it to 16"),
        ({"num_classes": 4}, r"config\.model\.num_classes: 4 .* set it to 3"),
    ],
)
def test_a_model_that_does_not_fit_the_codes_is_refused(codes, tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        loop.train(generator(codes, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_codes_of_another_tokenizer_than_the_configured_one_are_refused(codes, codec, tmp_path):
    with pytest.raises(ValueError, match=rf"made by tokenizer {codec.fingerprint}.*'0123abcd'"):
        loop.train(generator(codes, data={"tokenizer": "0123abcd"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = generator(codes, data={"tokenizer": codec.fingerprint})
    GeneratorTask(config, one_device_mesh(config))


def test_a_run_does_not_go_on_with_codes_of_another_tokenizer(trained, changed, codec):
    other = write_tokenizer(changed / "tokenizer.safetensors", seed=1).fingerprint
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["job"]["tokenizer"] = other
    (changed / "manifest.json").write_text(json.dumps(manifest))
    before = contents(trained)
    with pytest.raises(ValueError, match=rf"tokenizer {other}, but .* of {codec.fingerprint}"):
        loop.train(generator(changed, steps=5), trained)
    assert contents(trained) == before


def test_another_tokenizer_beside_the_codes_is_refused_before_a_run_begins(
    changed, codec, tmp_path
):
    other = write_tokenizer(changed / "tokenizer.safetensors", seed=1).fingerprint
    with pytest.raises(ValueError, match=rf"fingerprint {other}, .* by {codec.fingerprint}"):
        loop.train(generator(changed), tmp_path / "run")
    (changed / "tokenizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"tokenizer: .*tokenizer\.safetensors cannot be read"):
        loop.train(generator(changed), tmp_path / "run")
    (changed / "tokenizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer: there is no file .*safetensors"):
        loop.train(generator(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_beside_the_codes_makes_no_pictures(trained, changed, codec, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    other = write_tokenizer(changed / "tokenizer.safetensors", seed=1).fingerprint
    with pytest.raises(ValueError, match=rf"fingerprint {other}, .* by {codec.fingerprint}"):
        loop.train(generator(changed, steps=4, sample_every=4), copy)
    assert fingerprint(*load_tokenizer(copy / "tokenizer.safetensors")) == codec.fingerprint
    assert not (copy / "samples" / "step_0000004.png").exists()


def test_another_tokenizer_in_the_run_makes_no_pictures(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "tokenizer.safetensors").write_bytes(b"damaged")
    assert re.search("tokenizer: .* cannot be read", sample(copy, fails=True))
