"""Training of the `Classifier` on the real images that generated ones are compared with."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, Float32, Int32, PyTree, UInt8

from lasad_jax.data.images import ImageSet
from lasad_jax.evaluation.classifier import (
    Architecture,
    choose_architecture,
    class_agreement,
    classifier_features,
    init_classifier,
)
from lasad_jax.evaluation.classifier_files import (
    TrainedClassifier,
    check_path,
    images_fingerprint,
    load_classifier,
    read_classifier,
    save_classifier,
)
from lasad_jax.evaluation.extract import size
from lasad_jax.training.metrics import progress_bar

__all__ = [
    "TrainedClassifier",
    "class_agreement",
    "fit_classifier",
    "fit_or_load",
    "load_classifier",
    "read_classifier",
    "save_classifier",
]

# To be raised with every change that gives other parameters from the same images and seed.
RECIPE = 1

_BATCH_SIZE = 64
_LEARNING_RATE = 4e-3
_WEIGHT_DECAY = 0.05
_WARMUP = 0.1
_IMAGES_SEEN = 1_000_000
_MOST_EPOCHS = 20
_SHOWN_EVERY = 50
# At rate 1, which every step scales: so one program serves all numbers of steps.
_OPTIMIZER = optax.adamw(
    1.0, weight_decay=_WEIGHT_DECAY, mask=functools.partial(jax.tree.map, lambda x: x.ndim > 1)
)


def fit_classifier(
    real: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    epochs: int | None = None,
    name: str = "classifier",
    progress: bool = True,
) -> TrainedClassifier:
    """Trains a classifier on images and tries it on others.

    AdamW with a cosine schedule in batches of 64, each image shifted by up to an eighth of
    its sides. It is a small network: one device trains it, the first of this process, however
    many there are. The same device, versions and seed give the same parameters; other devices
    round differently, and training makes much of little. So fit once and keep the file.

    Args:
      real: to train on. Images of at least 8 x 8 pixels, 1 or 3 channels, meant for up to
        64 x 64.
      held_out: to measure the accuracy on, in the same classes.
      seed: of the first parameters, the order of the images and their shifts.
      epochs: passes over `real`; by default as many as show about a million images, but at
        most 20.
      name: what reports call the classifier, such as the data set's name.
      progress: show a progress bar.

    Raises:
      ValueError: images that no classifier is meant for, or held-out ones that do not fit.
    """
    architecture = _check(real, held_out)
    if epochs is None:
        epochs = min(max(round(_IMAGES_SEEN / len(real.images)), 1), _MOST_EPOCHS)
    if epochs < 1:
        raise ValueError(f"epochs: {epochs} must be at least 1")
    device = jax.local_devices()[0]
    with jax.default_device(device):
        step = _compiled_step(device.platform)
        params = _train(step, architecture, real, jax.random.key(seed), epochs, progress)
        logits = _logits(architecture, params, held_out.images)
    return TrainedClassifier(
        architecture=architecture,
        params=jax.tree.map(np.asarray, params),
        name=name,
        class_names=tuple(real.class_names),
        accuracy=class_agreement(logits, held_out.labels),
        trained_on=images_fingerprint(real),
        seed=seed,
        recipe=RECIPE,
    )


def fit_or_load(
    path: str | Path,
    real: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    epochs: int | None = None,
    name: str = "classifier",
    progress: bool = True,
) -> TrainedClassifier:
    """Reads the classifier of these images from a file, which is written if there is none.

    Every process calls it together; the first one trains and the others wait for its file.

    Args:
      path: ending in .safetensors.
      real, held_out, seed, epochs, name, progress: see `fit_classifier`. A file that is there
        keeps its own seed, epochs, name and held-out accuracy.

    Raises:
      ValueError: a file of a classifier that was trained on other images, or of none; and as
        `fit_classifier`.
    """
    path = Path(path)
    _check(real, held_out)
    check_path(path)
    # The first process decides, lest another one sees a file that it has just written.
    if not multihost_utils.broadcast_one_to_all(np.int32(path.is_file())):
        if jax.process_index() == 0:
            options = {"seed": seed, "epochs": epochs, "name": name, "progress": progress}
            save_classifier(path, fit_classifier(real, held_out, **options))
        multihost_utils.sync_global_devices("classifier")
    trained = read_classifier(path)
    if trained.trained_on != (expected := images_fingerprint(real)):
        raise ValueError(
            f"classifier: {path} was trained on other images ({trained.describe()}) than these, "
            f"whose fingerprint is {expected}; give another path, or remove the file to train anew"
        )
    return trained


def _check(real: ImageSet, held_out: ImageSet) -> Architecture:
    if len(real.images) == 0 or len(held_out.images) == 0:
        raise ValueError(
            f"classifier: it takes images to train on and others to try it on, got "
            f"{len(real.images)} and {len(held_out.images)}"
        )
    theirs, ours = held_out.images.shape[1:], real.images.shape[1:]
    if theirs != ours:
        raise ValueError(
            f"classifier: held-out images are {size(theirs)}, but those to train on "
            f"{size(ours)}; bring both to one size"
        )
    unknown = np.setdiff1d(held_out.labels, real.labels)
    if unknown.size:
        raise ValueError(
            f"classifier: held-out images show class {unknown[0]}, of which there is no image to "
            "train on; take both from the same data set"
        )
    return choose_architecture(real.images.shape[1:], real.num_classes)


def _train(
    step: Callable,
    architecture: Architecture,
    real: ImageSet,
    key: Array,
    epochs: int,
    progress: bool,
) -> PyTree[Float32[Array, "..."]]:
    count = len(real.images)
    batch_size = min(_BATCH_SIZE, count)
    steps = epochs * (count // batch_size)
    rates = _learning_rates(steps)
    init_key, order_key, shift_key = jax.random.split(key, 3)
    params = jax.jit(init_classifier, static_argnums=0)(architecture, init_key)
    opt_state = _OPTIMIZER.init(params)
    with progress_bar(0, steps, visible=progress) as bar:
        for number, rows in enumerate(_batches(order_key, count, batch_size, epochs)):
            batch = real.images[rows], real.labels[rows]
            params, opt_state, loss = step(
                architecture, params, opt_state, shift_key, number, rates[number], *batch
            )
            if number % _SHOWN_EVERY == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            bar.update()
    return params


@functools.cache
def _compiled_step(platform: str) -> Callable:
    # A GPU's fastest convolutions add in an order that changes from run to run.
    options = {"xla_gpu_deterministic_ops": True} if platform == "gpu" else None
    return jax.jit(_step, static_argnums=0, donate_argnums=(1, 2), compiler_options=options)


def _step(
    architecture: Architecture,
    params: PyTree,
    opt_state: optax.OptState,
    key: Array,
    number: Int32[Array, ""],
    rate: Float32[Array, ""],
    images: UInt8[Array, "B h w channels"],
    labels: Int32[Array, " B"],
) -> tuple[PyTree, optax.OptState, Float32[Array, ""]]:
    images = _shift(jax.random.fold_in(key, number), images)

    def mean_loss(params):
        logits = classifier_features(architecture, params, images).logits
        wanted = jax.nn.one_hot(labels, architecture.num_classes)
        return optax.softmax_cross_entropy(logits, wanted).mean()

    loss, gradient = jax.value_and_grad(mean_loss)(params)
    updates, opt_state = _OPTIMIZER.update(gradient, opt_state, params)
    params = jax.tree.map(lambda x, update: x + rate * update, params, updates)
    return params, opt_state, loss


def _batches(
    key: Array, count: int, batch_size: int, epochs: int
) -> Iterator[Int32[np.ndarray, " B"]]:
    """Numbers of images, shuffled anew in every epoch; what does not fill a batch is left out."""
    for epoch in range(epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), count))
        yield from order[: count // batch_size * batch_size].reshape(-1, batch_size)


def _learning_rates(steps: int) -> Float32[np.ndarray, " steps"]:
    """A linear rise over a tenth of the steps, then half a cosine down to 0."""
    warmup = math.ceil(_WARMUP * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, _LEARNING_RATE, warmup, steps + 1)
    return np.asarray(schedule(jnp.arange(1, steps + 1)), np.float32)


def _shift(key: Array, images: UInt8[Array, "B h w channels"]) -> UInt8[Array, "B h w channels"]:
    """Each image moved by up to an eighth of its sides; what comes in repeats the edge."""

    def moved(key, side):
        by = jax.random.randint(key, (len(images), 1), -(side // 8), side // 8 + 1)
        return jnp.clip(jnp.arange(side) + by, 0, side - 1)

    row_key, column_key = jax.random.split(key)
    rows, columns = moved(row_key, images.shape[1]), moved(column_key, images.shape[2])
    return jax.vmap(lambda image, r, c: image[r[:, None], c])(images, rows, columns)


def _logits(
    architecture: Architecture, params: PyTree, images: UInt8[np.ndarray, "N h w channels"]
) -> Float32[np.ndarray, "N K"]:
    features = jax.jit(classifier_features, static_argnums=0)
    batches = []
    for start in range(0, len(images), _BATCH_SIZE):
        batch = images[start : start + _BATCH_SIZE]
        # All batches alike, so that one program serves them.
        padded = np.zeros((_BATCH_SIZE, *batch.shape[1:]), np.uint8)
        padded[: len(batch)] = batch
        batches.append(np.asarray(features(architecture, params, padded).logits)[: len(batch)])
    return np.concatenate(batches)
