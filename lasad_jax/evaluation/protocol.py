"""What may be compared with what, so that a number means what its name says."""

import re
from pathlib import Path

from lasad_jax.data.sources import SPLITS
from lasad_jax.evaluation.extract import size

# What the samples are -> the split that they are compared with.
PROTOCOLS = {"generation": "train", "reconstruction": "test"}
# Inception was trained on colour photographs; smaller ones it only sees magnified.
_LEAST_SIDE = 32
# A classifier is small, and trained on images that are all in memory.
_LARGEST_SIDE = 128

_EXPLANATIONS = {
    "generation": (
        "samples of a generator are compared with the training images (for ImageNet ADM's "
        "VIRTUAL_imagenet256_labeled.npz); against the validation images their FID is higher and "
        "no published number. Give the training reference"
    ),
    "reconstruction": (
        "reconstructions of a tokenizer are compared with the validation images that they "
        "reconstruct; against the training images their FID is no published number. Give the "
        "validation reference (--split=test)"
    ),
}


def check_protocol(protocol: str, split: str, *, force: bool = False) -> None:
    """Refuses gFID against validation images and rFID against training images.

    Args:
      protocol: "generation" or "reconstruction", what the samples are.
      split: of the reference, "train" or "test".
      force: compare them all the same.

    Raises:
      ValueError: that mix-up, an unknown protocol or split.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {tuple(PROTOCOLS)}")
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {SPLITS}")
    if split != PROTOCOLS[protocol] and not force:
        other = next(name for name in PROTOCOLS if name != protocol)
        raise ValueError(
            f"protocol: {protocol!r} with a reference of split {split!r}: "
            f"{_EXPLANATIONS[protocol]}, say --protocol={other} if the samples are that, or "
            "--force"
        )


def split_of_file(path: str | Path, told: str | None, *, force: bool = False) -> str:
    """The split that a reference file is of: as told, or by its name.

    ADM's VIRTUAL_*.npz are of training images; a name with the word val or validation is of
    those ("test").

    Raises:
      ValueError: a name that does not tell, or that tells the opposite.
    """
    name = Path(path).name
    named = None
    if name.startswith("VIRTUAL_"):
        named = "train"
    elif re.search(r"(?<![a-z])val(id|idation)?(?![a-z])", name.lower()):
        named = "test"
    if told is None and named is None:
        raise ValueError(
            f"reference_split: the name of {name} does not tell whether it is of training or "
            "validation images; give --reference_split=train or --reference_split=test"
        )
    if None not in (told, named) and told != named and not force:
        raise ValueError(
            f"reference_split: {told!r}, but by its name {name} is of split {named!r}; leave the "
            "flag out, rename the file, or --force"
        )
    return told or named


def check_meaningful(kind: str, shape: tuple[int, int, int], *, force: bool = False) -> None:
    """Refuses networks on images that they are not meant for.

    Args:
      kind: of the features.
      shape: rows, columns and channels of the images.
      force: take their features all the same.

    Raises:
      ValueError: Inception, and grey images or sides below 32 pixels; a classifier, and sides
        above 128.
    """
    if kind == "classifier" and not force and max(shape[:2]) > _LARGEST_SIDE:
        raise ValueError(
            f"inception: images of {size(shape)} are too large for a classifier of the data; give "
            "Inception's weights with --inception=FILE, or --force to train one all the same"
        )
    if kind == "inception" and not force and (shape[-1] == 1 or min(shape[:2]) < _LEAST_SIDE):
        raise ValueError(
            f"inception: images of {size(shape)} are nothing like the colour photographs that "
            "Inception was trained on, so its features mean little; leave --inception out to "
            "compare by a classifier trained on the data itself, or --force"
        )
