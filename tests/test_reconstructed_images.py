"""A tokenizer's reconstructions, measured as samples are."""

import json

import jax
import numpy as np
import pytest
from processes import command
from tiny_tokenizer import tiny_tokenizer_config

from lasad_jax.config import DataConfig
from lasad_jax.data.images import load_images
from lasad_jax.evaluation.fit_classifier import fit_classifier, save_classifier
from lasad_jax.evaluation.requests import Request, carry_out
from lasad_jax.interop.tokenizer_files import save_tokenizer
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.models.tokenizer import init_tokenizer
from lasad_jax.sampling.pictures import write_npz


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A tokenizer of grey images, and a classifier of the digits that is hardly trained."""
    top = tmp_path_factory.mktemp("reconstructed")
    config = tiny_tokenizer_config().model
    save_tokenizer(top / "t.safetensors", config, init_tokenizer(config, jax.random.key(3)))
    digits = (load_images(DataConfig(), split) for split in ("train", "test"))
    classifier = fit_classifier(*digits, epochs=1, progress=False)
    save_classifier(top / "evaluation" / "classifier.safetensors", classifier)
    return top


def test_they_are_measured_as_a_file_of_them_would_be(top):
    carry_out(Request(tokenizer=top / "t.safetensors", data={"source": "digits"}))
    report = json.loads((top / "evaluation/reconstructions_test_classifier.json").read_text())
    assert (report["protocol"], report["reference"]["split"]) == ("reconstruction", "test")

    config = tiny_tokenizer_config().model
    codec = TokenizerCodec(config, init_tokenizer(config, jax.random.key(3)))
    images = load_images(DataConfig(), "test").images
    written = codec.decode(codec.encode(images), config.grid(images.shape[1:3]))
    assert not np.array_equal(written, images)
    write_npz(top / "file.npz", [written], np.zeros(len(images), np.int32))
    carry_out(
        Request(
            samples=top / "file.npz",
            data={"source": "digits"},
            protocol="reconstruction",
            metrics=("fid", "sfid", "inception_score", "precision_recall", "kid"),
        )
    )
    of_file = json.loads((top / "evaluation/file_classifier.json").read_text())
    scores = {"inception_score_classifier", "inception_score_std_classifier"}
    # A file that seems sorted by class is scored in another order.
    for name in report["metrics"].keys() - scores:
        assert report["metrics"][name] == of_file["metrics"][name]
    assert report["samples"]["fingerprint"] == codec.fingerprint
    assert report["samples"]["num_images"] == len(images)


def test_the_command(top):
    tokenizer = f"--tokenizer={top / 't.safetensors'}"
    said = command("evaluate", tokenizer, "--source=digits", "--metrics=fid")
    assert "reconstructions of digits, split test" in said
    said = command("evaluate", tokenizer, "--num=5", fails=True)
    assert "num: nothing is drawn with --tokenizer" in said


def test_the_training_images_are_no_reference_for_them(top):
    with pytest.raises(ValueError, match="'reconstruction' with a reference of split 'train'"):
        carry_out(
            Request(tokenizer=top / "t.safetensors", data={"source": "digits"}, split="train")
        )
