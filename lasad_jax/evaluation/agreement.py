"""Does a sample look like its class to a classifier that has only seen real images?"""

import numpy as np
from jaxtyping import Float, Integer, UInt8
from sklearn.svm import SVC

from lasad_jax.data.images import ImageSet


def class_agreement(
    samples: UInt8[np.ndarray, "M R C channels"],
    labels: Integer[np.ndarray, " M"],
    real: ImageSet,
) -> float:
    """The share of samples that a classifier puts into the class they were asked for.

    Args:
      samples: generated images, of the real ones' size.
      labels: the classes asked for.
      real: the images to fit the classifier on.

    Raises:
      ValueError: samples or labels that cannot be compared with the real images.
    """
    check_samples(samples, labels, real)
    return accuracy(fit_classifier(real), samples, labels)


def check_samples(
    samples: UInt8[np.ndarray, "M R C channels"], labels: Integer[np.ndarray, " M"], real: ImageSet
) -> None:
    """Refuses samples that cannot be compared with the real images; fitting may take minutes.

    Raises:
      ValueError: a wrong dtype, size or count, or a class that has no real image.
    """
    if samples.dtype != np.uint8 or samples.ndim != 4 or len(samples) == 0:
        raise ValueError(
            "samples must be uint8 of shape (M, R, C, channels), M > 0, "
            f"got {samples.dtype} of shape {samples.shape}"
        )
    if samples.shape[1:] != real.images.shape[1:]:
        raise ValueError(
            f"samples are {_size(samples)} but the real images {_size(real.images)}; "
            "compare with the source that the generator was trained on"
        )
    if labels.shape != samples.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of shape ({len(samples)},), one a sample, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    unknown = np.setdiff1d(labels, real.labels)
    if unknown.size:
        raise ValueError(
            f"labels hold class {unknown[0]}, of which there is no real image; "
            "compare with the source that the generator was trained on"
        )


def fit_classifier(real: ImageSet) -> SVC:
    """A support vector machine with an RBF kernel on pixels: no training recipe to tune."""
    return SVC(gamma="scale").fit(_features(real.images), real.labels)


def accuracy(
    classifier: SVC,
    images: UInt8[np.ndarray, "M R C channels"],
    labels: Integer[np.ndarray, " M"],
) -> float:
    """The share of images whose predicted class is the label."""
    return float(np.mean(classifier.predict(_features(images)) == labels))


def _features(images: UInt8[np.ndarray, "M R C channels"]) -> Float[np.ndarray, "M R*C*channels"]:
    return images.reshape(len(images), -1) / 255


def _size(images: np.ndarray) -> str:
    return " x ".join(map(str, images.shape[1:]))
