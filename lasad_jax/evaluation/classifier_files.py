"""Trained classifiers and their files: safetensors with one entry of metadata."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32, PyTree

from lasad_jax.data.images import ImageSet
from lasad_jax.evaluation.classifier import Architecture, classifier_features, init_classifier
from lasad_jax.evaluation.features import Extractor
from lasad_jax.files import whole_file
from lasad_jax.interop.state_dicts import check_shapes, read_tensors

_FIELD = "classifier"
_ENTRY = "classifier"
_HINT = "give a file that fit_or_load wrote, or remove it to train anew"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier and where it comes from.

    Attributes:
      architecture: of its network.
      params: float32, on the host.
      name: what reports call it, such as the data set's name.
      class_names: one for each class.
      accuracy: the share of held-out images that it puts into their class.
      trained_on: `images_fingerprint` of the images it was trained on.
      seed: of its training.
      recipe: the version of the training's recipe.
    """

    architecture: Architecture
    params: PyTree[Float32[np.ndarray, "..."]]
    name: str
    class_names: tuple[str, ...]
    accuracy: float
    trained_on: str
    seed: int
    recipe: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell apart classifiers with other features.

        The start of the SHA-256 over the architecture and every tensor by order of name, in
        float32, little-endian.
        """
        architecture = dataclasses.asdict(self.architecture)
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        for name, tensor in sorted(_flatten(self.params).items()):
            digest.update(f"{name}{tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor, "<f4"))
        return digest.hexdigest()[:16]

    @property
    def extractor(self) -> Extractor:
        """Its features as metrics take them."""
        return Extractor(
            kind="classifier",
            name=self.name,
            fingerprint=self.fingerprint,
            image_shape=self.architecture.image_shape,
            params=self.params,
            apply=functools.partial(classifier_features, self.architecture),
        )

    def describe(self) -> str:
        """Its origin in a line, for messages and reports."""
        rows, columns, channels = self.architecture.image_shape
        return (
            f"{self.name!r}, {len(self.class_names)} classes, {rows} x {columns} x {channels}, "
            f"fingerprint {self.trained_on}, held-out accuracy {self.accuracy:.4f}"
        )


def images_fingerprint(images: ImageSet) -> str:
    """16 hex digits that tell apart sets of images with their labels, by order."""
    digest = hashlib.sha256(f"{images.images.shape}".encode())
    digest.update(np.ascontiguousarray(images.images, np.uint8))
    digest.update(np.ascontiguousarray(images.labels, "<i4"))
    return digest.hexdigest()[:16]


def save_classifier(path: str | Path, trained: TrainedClassifier) -> None:
    """Writes a classifier so that the file is whole or not there at all.

    Args:
      path: ending in .safetensors; its folder is made if need be.
      trained: the classifier.

    Raises:
      ValueError: for another ending.
    """
    path = check_path(path)
    card = {
        field.name: getattr(trained, field.name)
        for field in dataclasses.fields(trained)
        if field.name not in ("architecture", "params")
    }
    card |= {
        "architecture": dataclasses.asdict(trained.architecture),
        "fingerprint": trained.fingerprint,
    }
    # One entry only: safetensors writes several in an order that changes from run to run.
    metadata = {_ENTRY: json.dumps(card)}
    with whole_file(path) as file:
        safetensors.numpy.save_file(_flatten(trained.params), file, metadata)


def read_classifier(path: str | Path) -> TrainedClassifier:
    """Reads what `save_classifier` wrote, bit for bit.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is damaged or something else.
    """
    path = check_path(path)
    tensors, metadata = read_tensors(_FIELD, path, _HINT)
    if _ENTRY not in metadata:
        raise ValueError(
            f"{_FIELD}: {path} holds tensors but no description of a classifier; {_HINT}"
        )
    try:
        card = json.loads(metadata[_ENTRY])
        stored = card.pop("fingerprint")
        architecture = _architecture(**card.pop("architecture"))
        card["class_names"] = tuple(card["class_names"])
        trained = TrainedClassifier(
            **card, architecture=architecture, params=unflatten_dict(tensors, sep=".")
        )
        shapes = _shapes(architecture)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{_FIELD}: {path} holds no description of a classifier that this version knows "
            f"({error}); {_HINT}"
        ) from error
    check_shapes(_FIELD, path, shapes, tensors)
    if trained.fingerprint != stored:
        raise ValueError(
            f"{_FIELD}: {path} is damaged: its parameters have fingerprint {trained.fingerprint}, "
            f"but were written with {stored}; {_HINT}"
        )
    return trained


def load_classifier(path: str | Path) -> Extractor:
    """The features of a classifier's file, see `read_classifier`."""
    return read_classifier(path).extractor


def check_path(path: str | Path) -> Path:
    """Refuses a path of another format.

    Raises:
      ValueError: one that does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{_FIELD}: {path} must end in .safetensors, the format of its files")
    return path


def _architecture(image_shape, num_classes, stride, widths) -> Architecture:
    return Architecture(tuple(image_shape), num_classes, stride, tuple(widths))


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    init = functools.partial(init_classifier, architecture)
    leaves = flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep=".")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _flatten(params: PyTree) -> dict[str, Float32[np.ndarray, "..."]]:
    return {name: np.asarray(x, np.float32) for name, x in flatten_dict(params, sep=".").items()}
