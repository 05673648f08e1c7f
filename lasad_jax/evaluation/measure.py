"""From a stream of images to the numbers that a report holds."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int, Integer

from lasad_jax.evaluation.classifier import class_agreement
from lasad_jax.evaluation.extract import Extraction, Images
from lasad_jax.evaluation.features import Features
from lasad_jax.evaluation.frechet import frechet_distance
from lasad_jax.evaluation.inception_score import ScoreSums
from lasad_jax.evaluation.kid import kid
from lasad_jax.evaluation.moments import Moments, MomentSums
from lasad_jax.evaluation.precision_recall import precision_recall

METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid", "class_agreement")
# Images whose features are kept, for precision, recall and KID.
MOST_KEPT = 10_000
_KID_SUBSET = 1000
_SPLITS = 10  # of the Inception Score


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of the features of a set of images.

    Attributes:
      count: of images.
      pooled, spatial: sums for FID and sFID.
      scores: sums for the Inception Score.
      kept: pooled features of some images, for precision, recall and KID.
      hits: images that a classifier puts into the class asked for.
    """

    count: int
    pooled: MomentSums
    spatial: MomentSums
    scores: ScoreSums | None
    kept: Float32[np.ndarray, "K D"]
    hits: int


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared with.

    Attributes:
      name: a file, or a source.
      fingerprint: of its content.
      split: "train" or "test".
      num_images: that its moments are of; 0 where it is not known.
      pooled: moments for FID.
      spatial: moments for sFID, if they are known.
      kept: pooled features of some images, if there are images.
    """

    name: str
    fingerprint: str
    split: str
    num_images: int
    pooled: Moments
    spatial: Moments | None
    kept: Float32[np.ndarray, "K D"] | None


def see(
    extraction: Extraction,
    images: Images,
    labels: Integer[np.ndarray, " N"] | None = None,
    *,
    metrics: Sequence[str] = ("fid", "sfid", "precision_recall", "kid"),
    most_kept: int = MOST_KEPT,
    name: str = "",
) -> Seen:
    """Takes features of all images, once, and keeps what metrics need of them.

    Args:
      extraction: the network.
      images: to look at.
      labels: the class of each image, for class agreement; see also `scoring_places`.
      metrics: that will be asked for; by default those that a reference takes part in.
      most_kept: images whose features are kept, chosen at random but always alike.
      name: of the progress bar; "" for none.

    Raises:
      ValueError: images or labels that the network does not take.
    """
    count, dims = len(images), extraction.dims(images.shape)
    pooled, spatial = MomentSums.empty(dims.pooled), MomentSums.empty(dims.spatial)
    scores = None
    if "inception_score" in metrics:
        scores = ScoreSums.empty(dims.logits, count, min(_SPLITS, count))
    places, chosen = scoring_places(labels), _chosen(count, most_kept)
    kept, hits = [np.zeros((0, dims.pooled), np.float32)], 0
    for first, features in extraction(images, name=name):
        here = slice(first, first + len(features.pooled))
        if "fid" in metrics:
            pooled = pooled.add(features.pooled)
        if "sfid" in metrics:
            spatial = spatial.add(features.spatial)
        if scores is not None:
            part = None if places is None else places[here]
            scores = _add_scores(scores, first, features, part)
        if {"precision_recall", "kid"} & set(metrics):
            kept.append(features.pooled[chosen[here]])
        if "class_agreement" in metrics:
            hits += round(class_agreement(features.logits, labels[here]) * len(features.logits))
    return Seen(count, pooled, spatial, scores, np.concatenate(kept), hits)


def choose_metrics(
    asked: Sequence[str] | None, *, kind: str, labelled: bool, spatial: bool, images: bool
) -> tuple[str, ...]:
    """The metrics that can be had; those asked for must be among them.

    Args:
      asked: names in `METRICS`; None for all that can be had.
      kind: of the features.
      labelled: the classes asked for are known.
      spatial, images: the reference has moments of spatial features, or images.

    Raises:
      ValueError: one that is unknown or that cannot be had.
    """
    lacking = {}
    if not spatial:
        lacking["sfid"] = "the reference has no mu_s and sigma_s"
    if not images:
        reason = "the reference has no images (arr_0)"
        lacking |= {"precision_recall": reason, "kid": reason}
    if not labelled:
        lacking["class_agreement"] = "the samples have no labels (arr_1)"
    if kind != "classifier":
        lacking["class_agreement"] = (
            "it takes a classifier of the data set; leave --inception out and ask for it alone"
        )
    if asked is None:
        return tuple(name for name in METRICS if name not in lacking)
    for name in asked:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is not one of {', '.join(METRICS)}")
        if name in lacking:
            raise ValueError(f"metrics: no {name}: {lacking[name]}")
    return tuple(name for name in METRICS if name in asked)


def check_count(
    count: int,
    dims: Features,
    metrics: Sequence[str],
    *,
    field: str = "samples",
    force: bool = False,
) -> None:
    """Refuses too few images for a covariance, before any is drawn or looked at.

    Args:
      count: of images.
      dims: sizes of their features.
      metrics: that are asked for.
      field: that says how many, for the message.
      force: only refuse what cannot be computed.

    Raises:
      ValueError: naming the metric, and how many it takes.
    """
    for name, dim in (("fid", dims.pooled), ("sfid", dims.spatial)):
        least = 2 if force else dim + 1
        if name in metrics and count < least:
            rest = [metric for metric in metrics if metric not in ("fid", "sfid")]
            raise ValueError(
                f"{field}: {count} are too few for {name}: the covariance of {dim} features is "
                f"singular below {dim + 1} images, and the distance too high; take at least that "
                f"(50,000 are usual), or leave it out (metrics={','.join(rest) or METRICS[-1]}); "
                "lasad_jax.evaluate also takes --force"
            )


def measure(seen: Seen, reference: Reference | None, metrics: Sequence[str]) -> dict[str, float]:
    """The metrics asked for, from features that have been seen.

    Args:
      seen: of the generated images.
      reference: the real ones; only the Inception Score and class agreement go without.
      metrics: names in `METRICS`.

    Returns:
      "fid", "sfid", "inception_score" and "inception_score_std", "precision", "recall", "kid"
      and "kid_std", "class_agreement"; in this order.
    """
    values = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(seen.pooled.finish(), reference.pooled)
    if "sfid" in metrics:
        values["sfid"] = frechet_distance(seen.spatial.finish(), reference.spatial)
    if "inception_score" in metrics:
        values["inception_score"], values["inception_score_std"] = seen.scores.finish()
    if "precision_recall" in metrics:
        values["precision"], values["recall"] = precision_recall(reference.kept, seen.kept)
    if "kid" in metrics:
        subset = min(_KID_SUBSET, len(reference.kept), len(seen.kept))
        values["kid"], values["kid_std"] = kid(reference.kept, seen.kept, subset_size=subset)
    if "class_agreement" in metrics:
        values["class_agreement"] = seen.hits / seen.count
    return {name: float(value) for name, value in values.items()}


def scoring_places(labels: Integer[np.ndarray, " N"] | None) -> Int[np.ndarray, " N"] | None:
    """Where each image stands among the splits of the Inception Score, in place of its number.

    ADM's splits are of consecutive images, whose classes must be mixed: in a file that is
    sorted by class each split would have few, and the score would be far too low. Such a file
    is shuffled, always alike; others are taken as they are (None).
    """
    if labels is None or len(labels) < 2 or np.any(np.diff(labels) < 0):
        return None
    return np.random.default_rng(0).permutation(len(labels))


def _add_scores(
    sums: ScoreSums, first: int, features: Features, places: Int[np.ndarray, " B"] | None
) -> ScoreSums:
    if places is None:
        return sums.add(first, features.logits)
    for place, logits in zip(places.tolist(), features.logits, strict=True):
        sums = sums.add(place, logits[None])
    return sums


def _chosen(count: int, most: int) -> Bool[np.ndarray, " count"]:
    """Images to keep. Random ones: files are often sorted by class, or repeat the classes."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[:most]] = True
    return chosen
