"""The decoding loop: one compiled scan over tokens, its memory independent of their number."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from lasad_jax.config import SamplingConfig
from lasad_jax.models import decoder
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder import Weights
from lasad_jax.sampling.filters import draw
from lasad_jax.sampling.guidance import guidance_scale, guide
from lasad_jax.training.sharding import replicated


def generate(
    model_config: ModelConfig,
    weights: Weights,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    given: Int[Array, "B n"],
    sampling: SamplingConfig,
) -> Int[Array, "B N"]:
    """Draws images code by code.

    Args:
      model_config: the generator's.
      weights: its parameters, from `decoder.prepare`.
      labels: class of each image; num_classes for none.
      keys: one per image, so that an image does not depend on its neighbours in the batch.
      given: the first n codes of each image, kept as they are; n may be 0.
      sampling: guidance and filters.

    Returns:
      all N = R * C codes of each image.
    """
    num_tokens = model_config.num_tokens
    num_given, guided = given.shape[1], sampling.guidance != 1
    # Guidance runs both halves as one batch: first with the class, then without.
    double = lambda x: jnp.concatenate([x, x]) if guided else x
    null = jnp.full_like(labels, model_config.num_classes)
    all_labels = jnp.concatenate([labels, null]) if guided else labels

    def choose(features, token, uniforms):
        if guided:
            # Before the head, which is linear: it then sees each image once.
            conditional, unconditional = jnp.split(features, 2)
            scale = guidance_scale(sampling, token, num_tokens)
            features = guide(conditional, unconditional, scale)
        return draw(decoder.logits(weights, features), uniforms, sampling).astype(jnp.int32)

    def next_token(carry, of_token):
        features, cache = carry
        chosen = choose(features, *of_token)
        return decoder.decode(model_config, weights, double(chosen), cache), chosen

    if num_given == num_tokens:
        return given
    carry = decoder.prefill(model_config, weights, all_labels, double(given))
    tokens = jnp.arange(num_given, num_tokens)
    uniform = lambda token, key: jax.random.uniform(jax.random.fold_in(key, token))
    uniforms = jax.vmap(jax.vmap(uniform, (None, 0)), (0, None))(tokens, keys)
    (features, _), drawn = jax.lax.scan(next_token, carry, (tokens[:-1], uniforms[:-1]))
    final = choose(features, tokens[-1], uniforms[-1])
    return jnp.concatenate([given, drawn.T, final[:, None]], axis=1)


@functools.partial(jax.jit, static_argnames=("model_config", "sampling", "mesh"))
def _generate_everywhere(model_config, sampling, mesh, weights, base_key, labels, numbers, given):
    """`generate` for images `numbers`, an equal part of them on each device.

    No image depends on another, so that nothing is communicated.
    """

    def part(weights, base_key, labels, numbers, given):
        base_key = jax.random.wrap_key_data(base_key)
        keys = jax.vmap(lambda number: jax.random.fold_in(base_key, number))(numbers)
        if given.size == 0:
            # A part of an empty array, concatenated, crashes XLA's compiler in jax 0.11.
            given = jnp.zeros_like(given)
        # Logical axes name parts of the mesh, of which nothing is left inside.
        with nn.logical_axis_rules(()):
            return generate(model_config, weights, labels, keys, given, sampling)

    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(whole, whole, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )(weights, base_key, labels, numbers, given)


_prepare = jax.jit(decoder.prepare, static_argnums=(0, 2))


def balanced_labels(num: int, num_classes: int) -> Int[np.ndarray, " num"]:
    """`num` labels in order, each class as often as any other, give or take one."""
    return (np.arange(num, dtype=np.int64) * num_classes // num).astype(np.int32)


def sample_tokens(
    model_config: ModelConfig,
    params: PyTree,
    labels: Int[np.ndarray, " num"],
    *,
    sampling: SamplingConfig,
    seed: int,
    mesh: Mesh,
    batch_size: int = 128,
    given: Int[np.ndarray, "num n"] | None = None,
) -> Int[np.ndarray, "num N"]:
    """Draws any number of images in batches over all devices.

    Arguments, errors and what an image depends on are those of `sample_batches`, which gives
    the images as they come.
    """
    size = _batch_rows(mesh, batch_size, len(labels))
    batches = [np.arange(len(labels))[i : i + size] for i in range(0, len(labels), size)]
    drawn = sample_batches(
        model_config,
        params,
        labels,
        batches,
        sampling=sampling,
        seed=seed,
        mesh=mesh,
        batch_size=size,
        given=given,
    )
    return np.concatenate([tokens for _, tokens in drawn])


def sample_batches(
    model_config: ModelConfig,
    params: PyTree,
    labels: Int[np.ndarray, " num"],
    batches: Iterable[Int[np.ndarray, " b"]],
    *,
    sampling: SamplingConfig,
    seed: int,
    mesh: Mesh,
    batch_size: int = 128,
    given: Int[np.ndarray, "num n"] | None = None,
) -> Iterator[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b N"]]]:
    """Draws some of `num` images, batch by batch over all devices.

    Image number i depends on (seed, i), its label and its given codes alone: in float32 the
    same for any batches and any number of devices.

    Args:
      model_config, params: the generator.
      labels: class of each of all images; num_classes for none.
      batches: numbers of the images to draw, at most batch_size at a time.
      sampling: guidance and filters.
      seed: of all images.
      mesh: the devices; each has all parameters and an equal part of every batch.
      batch_size: images at a time; computed are as many as the devices share evenly.
      given: the first n codes of each of all images.

    Returns:
      an iterator of each batch's numbers and its images' codes, in every process.

    Raises:
      ValueError: for a label or given code out of range.
    """
    labels = np.asarray(labels, np.int32)
    given = np.zeros((len(labels), 0), np.int32) if given is None else np.asarray(given, np.int32)
    _check(model_config, labels, given)
    size = _batch_rows(mesh, batch_size, len(labels))
    rows, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), replicated(mesh)
    weights = _prepare(
        model_config, jax.device_put(params, whole), _rows_of_device(mesh, size, sampling)
    )
    base_key = jax.device_put(np.asarray(jax.random.key_data(jax.random.key(seed))), whole)

    def draw_batch(numbers):
        # Filled up with repeats: one shape, one compilation.
        filled = np.pad(numbers, (0, size - len(numbers)), mode="edge")
        of_images = jax.device_put((labels[filled], filled, given[filled]), rows)
        tokens = _generate_everywhere(model_config, sampling, mesh, weights, base_key, *of_images)
        # One process has all of them already, and its devices need not wait for one another.
        return numbers, tokens if tokens.is_fully_addressable else jax.device_put(tokens, whole)

    return _fetched(map(draw_batch, batches))


def _fetched(
    drawn: Iterator[tuple[Int[np.ndarray, " b"], Int[Array, "size N"]]],
) -> Iterator[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b N"]]]:
    """Batches on the host, while the devices draw the next one."""
    fetch = lambda numbers, tokens: (numbers, np.asarray(tokens)[: len(numbers)])
    waiting = next(drawn, None)
    while waiting is not None:
        following = next(drawn, None)
        yield fetch(*waiting)
        waiting = following


def lower_programs(
    model_config: ModelConfig,
    params: PyTree,
    *,
    sampling: SamplingConfig,
    mesh: Mesh,
    batch_size: int = 128,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Traces what `sample_batches` runs to draw images from nothing but their classes.

    If both programs are compiled ahead, in any thread, the call there finds them done.

    Args:
      model_config, sampling, mesh, batch_size: as there.
      params: the generator's, or their shapes.

    Returns:
      what prepares the weights, and what draws a batch.
    """
    rows, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), replicated(mesh)
    place = lambda tree, sharding: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    size = _batch_rows(mesh, batch_size, batch_size)
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32)
    given = jax.ShapeDtypeStruct((size, 0), jnp.int32)
    base_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    num_rows = _rows_of_device(mesh, size, sampling)
    prepare = _prepare.lower(model_config, place(params, whole), num_rows)
    shared = place((prepare.out_info, base_key), whole)
    of_images = place((numbers, numbers, given), rows)
    return prepare, _generate_everywhere.lower(model_config, sampling, mesh, *shared, *of_images)


def _batch_rows(mesh: Mesh, batch_size: int, num: int) -> int:
    return -(-min(batch_size, max(num, 1)) // mesh.size) * mesh.size


def _rows_of_device(mesh: Mesh, size: int, sampling: SamplingConfig) -> int:
    """That it decodes at a time, of a batch of that size."""
    return size // mesh.size * (2 if sampling.guidance != 1 else 1)


def _check(config: ModelConfig, labels: np.ndarray, given: np.ndarray) -> None:
    if labels.size == 0:
        raise ValueError("labels: none given; name at least one class")
    if labels.min() < 0 or labels.max() > config.num_classes:
        raise ValueError(
            f"labels: {labels[(labels < 0) | (labels > config.num_classes)][0]} is no class; "
            f"classes are 0 to {config.num_classes - 1} ({config.num_classes} for none)"
        )
    if given.shape[0] != len(labels) or given.shape[1] > config.num_tokens:
        raise ValueError(
            f"given: expected ({len(labels)}, up to {config.num_tokens}) codes, got {given.shape}"
        )
    if given.size and (given.min() < 0 or given.max() >= config.vocab_size):
        raise ValueError(f"given: codes must be 0 to {config.vocab_size - 1}")
