"""Drawing images on the device: its time over the bytes it must read, along the sequence too."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp

from lasad_jax.benchmarks import decoding, llamagen
from lasad_jax.benchmarks.compiling import compiled
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.limits import AllocatorPeak, compiled_bytes
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.timing import seconds_per_call
from lasad_jax.models import ModelConfig, count_parameters, counts
from lasad_jax.models.decoder import Weights
from lasad_jax.models.generator import init_parameters
from lasad_jax.training.state import unbox

_ROWS_PER_IMAGE = 2  # guidance: with the class and without


@functools.partial(jax.jit, static_argnums=0)
def _make_weights(config: ModelConfig) -> Weights:
    return decoding.prepare(config, unbox(init_parameters(config, jax.random.key(0))))


def drawing_inputs(case: GeneratorCase, mixer: str) -> tuple[Weights, jax.Array, jax.Array]:
    """What a drawing takes: random weights, labels and keys."""
    config = case.model(mixer)
    labels = jnp.arange(case.batch) % config.num_classes
    return _make_weights(config), labels, jax.random.split(jax.random.key(1), case.batch)


def lower_drawing(case: GeneratorCase, mixer: str) -> jax.stages.Lowered:
    """Traces the drawing of a batch; nothing is allocated."""
    shapes = jax.eval_shape(lambda: drawing_inputs(case, mixer))
    return jax.jit(functools.partial(decoding.draw_images, case.model(mixer))).lower(*shapes)


def time_row(
    case: GeneratorCase,
    mixer: str,
    draw: jax.stages.Compiled | Exception,
    *,
    bytes_per_second: float,
    how: dict,
) -> dict:
    """One row of the table: medians in seconds, or under "skipped" why there are none.

    Args:
      case, mixer: which generator.
      draw: compiled from `lower_drawing`, or why it could not be.
      bytes_per_second: of a plain copy.
      how: repeats and min_seconds, as in `seconds_per_call`.
    """
    config = case.model(mixer)
    floor_bytes = counts.read_per_token(config, _ROWS_PER_IMAGE * case.batch)
    row = {
        "case": str(case),
        "tokens": case.tokens,
        "mixer": mixer,
        "parameters": count_parameters(config),
        "floor_bytes": floor_bytes,
        "floor_seconds": sum(floor_bytes.values()) / bytes_per_second,
    }
    if peer := llamagen.SAMPLING.get(case.peer_key):
        row["llamagen"] = peer._asdict()
    allocator = AllocatorPeak()
    try:
        draw = compiled(draw)
        # One set of inputs: what thousands of tokens leave in a cache helps no next image.
        runs = seconds_per_call(draw, [drawing_inputs(case, mixer)], **how)
    except Exception as error:  # what does not fit says so; the others go on
        return row | {"skipped": one_line(error)}
    seconds = statistics.median(runs)
    row |= {
        "seconds": seconds,
        "runs": runs,
        "images_per_second": case.batch / seconds,
        "seconds_per_token": seconds / case.tokens,
        "over_floor": seconds / case.tokens / row["floor_seconds"],
        "memory_bytes": compiled_bytes(draw),
        "allocator_bytes": allocator.bytes(),
    }
    if peer:
        row["over_llamagen"] = row["images_per_second"] / peer.images_per_second
    return row


def lower_along(case: GeneratorCase, mixer: str, length: int) -> jax.stages.Lowered:
    """Traces the drawing of the next `length` codes, the likeliest each time."""
    config = case.model(mixer)

    def segment(weights, tokens, cache):
        def step(carry, _):
            logits, cache = decoding.step(config, weights, *carry)
            return (jnp.argmax(logits, axis=-1), cache), None

        return jax.lax.scan(step, (tokens, cache), None, length)[0]

    shapes = jax.eval_shape(lambda: _begin_along(case, config, _make_weights(config)))
    return jax.jit(segment, donate_argnums=(1, 2)).lower(*shapes)


def _begin_along(case: GeneratorCase, config: ModelConfig, weights: Weights) -> tuple:
    """What a segment takes: the weights, the first codes and the cache."""
    labels = jnp.arange(_ROWS_PER_IMAGE * case.batch) % config.num_classes
    logits, cache = decoding.begin(config, weights, labels)
    return weights, jnp.argmax(logits, axis=-1), cache


def along_row(
    case: GeneratorCase,
    mixer: str,
    segment: jax.stages.Compiled | Exception,
    *,
    length: int,
    repeats: int,
) -> dict:
    """Time of a token as it depends on how many came before.

    Images are drawn from their first token to their last, the likeliest code each time, in
    segments that one compiled program takes turn by turn.

    Args:
      case, mixer: which generator; rows are twice the batch, as with guidance.
      segment: compiled from `lower_along`, or why it could not be.
      length: tokens of a segment; tokens at the end that fill none are left out.
      repeats: passes over the sequence, of which the median of each segment counts.

    Returns:
      "positions": tokens before each segment; "seconds_per_token" in it; or "skipped".
    """
    row = {"case": str(case), "mixer": mixer}
    try:
        runs = _pass_times(case, mixer, compiled(segment), length=length, repeats=repeats)
    except Exception as error:
        return row | {"skipped": one_line(error)}
    times = [statistics.median(passes) / length for passes in zip(*runs, strict=True)]
    positions = [length * i for i in range(len(times))]
    return row | {"length": length, "positions": positions, "seconds_per_token": times}


def _pass_times(
    case: GeneratorCase, mixer: str, segment: jax.stages.Compiled, *, length: int, repeats: int
) -> list[list[float]]:
    """Seconds of each segment, for each pass; a first pass warms up and does not count."""
    config = case.model(mixer)
    weights = _make_weights(config)
    begin = jax.jit(functools.partial(_begin_along, case, config))
    passes = []
    for _ in range(repeats + 1):
        _, tokens, cache = jax.block_until_ready(begin(weights))
        times = []
        for _ in range(case.tokens // length):
            since = time.perf_counter()
            tokens, cache = jax.block_until_ready(segment(weights, tokens, cache))
            times.append(time.perf_counter() - since)
        passes.append(times)
    return passes[1:]


def memory_row(case: GeneratorCase, mixer: str, draw: jax.stages.Compiled | Exception) -> dict:
    """Memory of drawing a batch, compiled and not run: "memory_bytes", or "skipped"."""
    row = {"case": str(case), "tokens": case.tokens, "mixer": mixer}
    if isinstance(draw, Exception):
        return row | {"skipped": one_line(draw)}
    return row | {"memory_bytes": compiled_bytes(draw)}
