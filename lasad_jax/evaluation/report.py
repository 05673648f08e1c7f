"""What an evaluation says: every number with what it was measured on, as text and as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lasad_jax.config import SamplingConfig
from lasad_jax.evaluation.features import Extractor
from lasad_jax.evaluation.measure import Reference
from lasad_jax.files import whole_file
from lasad_jax.sampling.pictures import read_comment

# Metric -> its name for people.
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "inception_score_std": "Inception Score std",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "kid_std": "KID std",
}
# It is of classes, not of features, and there only is the classifier's.
_AGREEMENT = "class_agreement"
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))


@dataclasses.dataclass(frozen=True)
class Report:
    """One evaluation.

    Attributes:
      metrics: from `name_metrics`.
      features: kind, name and fingerprint of the network, and of a classifier its accuracy on
        held-out real images.
      reference: name, fingerprint, split and number of images; None if no metric takes one.
      protocol: "generation" or "reconstruction".
      forced: refusals were switched off.
      samples: name, fingerprint and number of the images measured.
      checkpoint: step, parameters and seed that they were drawn with, where known.
      sampling: settings that they were drawn with, where known.
    """

    metrics: Mapping[str, float]
    features: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    protocol: str
    forced: bool
    samples: Mapping[str, Any]
    checkpoint: Mapping[str, Any] | None
    sampling: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def table(self) -> str:
        """As lines of text."""
        kind = self.features["kind"]
        number = lambda value: f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"
        rows = [("images", f"{self.samples['num_images']}")]
        for name, value in self.metrics.items():
            if not name.endswith(f"_std_{kind}"):
                spread = self.metrics.get(f"{name.removesuffix(kind)}std_{kind}")
                shown = number(value) if spread is None else f"{number(value)} ± {number(spread)}"
                rows.append((display_name(name), shown))
        if "accuracy" in self.features:
            rows.append(("real images", f"{self.features['accuracy']:.4f} (held out)"))
        rows += [
            ("features", "{kind} {name} ({fingerprint})".format(**self.features)),
            ("reference", _reference_words(self.reference)),
            ("protocol", self.protocol + (" (forced)" if self.forced else "")),
            ("samples", "{name} ({fingerprint})".format(**self.samples)),
            ("checkpoint", _words(self.checkpoint)),
            ("sampling", _words(self.sampling)),
        ]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def write(self, out: Path) -> None:
        """Writes OUT.json and OUT.txt."""
        for ending, text in (
            (".json", json.dumps(self.to_json(), indent=2)),
            (".txt", self.table()),
        ):
            with whole_file(Path(f"{out}{ending}")) as file:
                file.write_text(text + "\n", "utf-8")


def make_report(
    values: Mapping[str, float],
    extractor: Extractor,
    reference: Reference | None,
    *,
    protocol: str,
    forced: bool,
    samples: Mapping[str, Any],
    comment: Mapping[str, Any],
    accuracy: float | None = None,
) -> Report:
    """The report of measured values.

    Args:
      values: from `measure`.
      extractor, reference: that they were measured with.
      protocol, forced, samples: see `Report`.
      comment: of the samples' file, see `sample_comment`.
      accuracy: of a classifier on held-out real images.
    """
    features = describe_features(extractor)
    if accuracy is not None:
        features["accuracy"] = accuracy
    part = lambda *names: {name: comment[name] for name in names if name in comment} or None
    return Report(
        metrics=name_metrics(values, extractor.kind),
        features=features,
        reference=reference and describe_reference(reference),
        protocol=protocol,
        forced=forced,
        samples=samples,
        checkpoint=part("step", "parameters", "seed", "labels", "given"),
        sampling=part(*_SAMPLING),
    )


def describe_features(extractor: Extractor) -> dict[str, Any]:
    """Whose features they are."""
    return {name: getattr(extractor, name) for name in ("kind", "name", "fingerprint")}


def describe_reference(reference: Reference) -> dict[str, Any]:
    """What was compared with."""
    names = ("name", "fingerprint", "split", "num_images")
    return {name: getattr(reference, name) for name in names}


def name_metrics(values: Mapping[str, float], kind: str) -> dict[str, float]:
    """Metrics by names that keep kinds of features apart: "fid_inception", "fid_classifier"."""
    return {
        name if name == _AGREEMENT else f"{name}_{kind}": value for name, value in values.items()
    }


def display_name(name: str) -> str:
    """For people: "FID (classifier)" for "fid_classifier"."""
    if name == _AGREEMENT:
        return "class agreement"
    metric, _, kind = name.rpartition("_")
    return f"{NAMES[metric]} ({kind})"


def sample_comment(path: Path) -> dict[str, Any]:
    """What a file of samples says of itself; empty where it says nothing."""
    try:
        value = json.loads(read_comment(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _words(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "unknown (the file does not say)"
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _reference_words(reference: Mapping[str, Any] | None) -> str:
    if reference is None:
        return "none (no metric takes one)"
    count = reference["num_images"]
    what = f"{count} images" if count else "statistics of an unknown number of images"
    return "{name} ({fingerprint}), split {split}, ".format(**reference) + what
