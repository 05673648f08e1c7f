"""Drawing images on the device: its time over the bytes it must read, along the sequence too."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lasad_jax.benchmarks import counts, llamagen
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.limits import AllocatorPeak, compiled_bytes
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.timing import seconds_per_call
from lasad_jax.config import SamplingConfig
from lasad_jax.models import LASADGen, ModelConfig, count_parameters
from lasad_jax.models.generator import init_parameters
from lasad_jax.sampling.decode import generate
from lasad_jax.training.state import unbox

GUIDANCE = 2.0
_ROWS_PER_IMAGE = 2  # with the class and without


def draw_images(config: ModelConfig, params: PyTree, labels, keys):
    """All codes of images, with guidance: what the table times."""
    given = jnp.zeros((len(labels), 0), jnp.int32)
    return generate(config, params, labels, keys, given, SamplingConfig(guidance=GUIDANCE))


def make_decoder(config: ModelConfig) -> tuple[Callable, Callable, Callable]:
    """How one token after the other is decoded.

    Returns:
      prepare: params -> weights; start: a prefilled cache -> cache;
      decode: (weights, tokens, cache) -> (logits, cache).
    """
    model = LASADGen(config)
    decode = lambda weights, tokens, cache: model.apply(
        {"params": weights}, tokens, cache, method="decode_step"
    )
    return lambda params: params, lambda cache: cache, decode


def _make_params(config: ModelConfig) -> PyTree:
    return unbox(init_parameters(config, jax.random.key(0)))


def _make_inputs(case: GeneratorCase, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    labels = jnp.arange(case.batch) % config.num_classes
    return labels, jax.random.split(jax.random.key(1), case.batch)


def _compile_drawing(case: GeneratorCase, config: ModelConfig) -> jax.stages.Compiled:
    """Nothing is allocated for it."""
    shapes = jax.eval_shape(lambda: (_make_params(config), *_make_inputs(case, config)))
    return jax.jit(functools.partial(draw_images, config)).lower(*shapes).compile()


def time_row(case: GeneratorCase, mixer: str, *, bytes_per_second: float, how: dict) -> dict:
    """One row of the table: medians in seconds, or under "skipped" why there are none.

    Args:
      case, mixer: which generator.
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
        draw = _compile_drawing(case, config)
        params = jax.jit(lambda: _make_params(config))()
        # One set of inputs: what thousands of tokens leave in a cache helps no next image.
        runs = seconds_per_call(draw, [(params, *_make_inputs(case, config))], **how)
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


def along_row(case: GeneratorCase, mixer: str, *, length: int, repeats: int) -> dict:
    """Time of a token as it depends on how many came before.

    Images are drawn from their first token to their last, the likeliest code each time, in
    segments that one compiled program takes turn by turn.

    Args:
      case, mixer: which generator; rows are twice the batch, as with guidance.
      length: tokens of a segment; tokens at the end that fill none are left out.
      repeats: passes over the sequence, of which the median of each segment counts.

    Returns:
      "positions": tokens before each segment; "seconds_per_token" in it; or "skipped".
    """
    row = {"case": str(case), "mixer": mixer}
    try:
        runs = _pass_times(case, mixer, length=length, repeats=repeats)
    except Exception as error:
        return row | {"skipped": one_line(error)}
    times = [statistics.median(passes) / length for passes in zip(*runs, strict=True)]
    positions = [length * i for i in range(len(times))]
    return row | {"length": length, "positions": positions, "seconds_per_token": times}


def _pass_times(case: GeneratorCase, mixer: str, *, length: int, repeats: int) -> list[list[float]]:
    """Seconds of each segment, for each pass; a first pass warms up and does not count."""
    config = case.model(mixer)
    prepare, start, decode = make_decoder(config)

    def begin(params, labels):
        none = jnp.zeros((len(labels), 0), jnp.int32)
        logits, cache = LASADGen(config).apply({"params": params}, labels, none, method="prefill")
        return jnp.argmax(logits, axis=-1), start(cache)

    def segment(weights, tokens, cache):
        def step(carry, _):
            logits, cache = decode(weights, *carry)
            return (jnp.argmax(logits, axis=-1), cache), None

        return jax.lax.scan(step, (tokens, cache), None, length)[0]

    begin, segment = jax.jit(begin), jax.jit(segment, donate_argnums=(1, 2))
    params = jax.jit(lambda: _make_params(config))()
    weights = jax.jit(prepare)(params)
    labels = jnp.arange(_ROWS_PER_IMAGE * case.batch) % config.num_classes
    passes = []
    for _ in range(repeats + 1):
        tokens, cache = jax.block_until_ready(begin(params, labels))
        times = []
        for _ in range(case.tokens // length):
            since = time.perf_counter()
            tokens, cache = jax.block_until_ready(segment(weights, tokens, cache))
            times.append(time.perf_counter() - since)
        passes.append(times)
    return passes[1:]


def memory_row(case: GeneratorCase, mixer: str) -> dict:
    """Memory of drawing a batch, compiled and not run: "memory_bytes", or "skipped"."""
    row = {"case": str(case), "tokens": case.tokens, "mixer": mixer}
    try:
        compiled = _compile_drawing(case, case.model(mixer))
    except Exception as error:
        return row | {"skipped": one_line(error)}
    return row | {"memory_bytes": compiled_bytes(compiled)}
