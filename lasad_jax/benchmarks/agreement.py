"""Whether fast decoding in bf16 draws codes as often as the plain path does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from lasad_jax.benchmarks.compiling import compile_all, compiled
from lasad_jax.benchmarks.generators import GeneratorCase, random_batch
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.config import SamplingConfig
from lasad_jax.models import LASADGen, ModelConfig, decoder
from lasad_jax.models.decoder import Weights
from lasad_jax.models.generator import init_parameters
from lasad_jax.sampling.decode import generate
from lasad_jax.sampling.filters import draw
from lasad_jax.training.state import unbox

# Places at the end whose codes are counted.
_COUNTED = 8
_SEEDS = 2
# Spread of the logits: a few codes of thousands are then likely, as in trained models.
_SPREAD = 4.0


def agreement_row(case: GeneratorCase, mixer: str, images: int) -> dict:
    """Total variation between histograms of the codes drawn after one prefix.

    The prefix is half an image; the codes of the last places are counted, each place by itself,
    and the mean over places is what is returned. A generator with random weights has its head's
    scaled so that few codes are likely.

    Args:
      case, mixer: which generator.
      images: drawn by each path with each of two seeds; so many batches as they fill.

    Returns:
      "plain": between two seeds of the plain path (the model's own `decode_step`, one token
      after the other); "fast": between two seeds of the fast one; "between": from one path to
      the other, of different seeds, the larger of two; or "skipped".
    """
    row, config = {"case": str(case), "mixer": mixer}, case.model(mixer)
    try:
        counts = _histograms(config, case.batch, -(-images // case.batch))
    except Exception as error:  # what does not fit says so; the others go on
        return row | {"skipped": one_line(error)}
    tv = lambda a, b: float(np.abs(a - b).sum(axis=-1).mean() / 2)
    fast, plain = counts["fast"], counts["plain"]
    return row | {
        "images": case.batch * -(-images // case.batch),
        "plain": tv(*plain),
        "fast": tv(*fast),
        "between": max(tv(fast[0], plain[1]), tv(fast[1], plain[0])),
    }


def _histograms(config: ModelConfig, batch: int, batches: int) -> dict[str, list[np.ndarray]]:
    """For each path and seed the share of each code at each place (places, V)."""
    params = jax.jit(functools.partial(_parameters, config))()
    weights = jax.jit(functools.partial(decoder.prepare, config))(params)
    prefix = random_batch(config, 1, 0)["tokens"][:, : config.num_tokens // 2]
    given = jnp.broadcast_to(prefix, (batch, prefix.shape[1]))
    labels = jnp.zeros(batch, jnp.int32)
    keys = lambda number: jax.random.split(jax.random.key(number), batch)
    paths, learned = {"fast": _fast, "plain": _plain}, {"fast": weights, "plain": params}
    programs = compile_all(
        {
            name: functools.partial(
                jax.jit(functools.partial(path, config)).lower,
                *(learned[name], labels, keys(0), given),
            )
            for name, path in paths.items()
        }
    )
    counts = {name: [] for name in paths}
    for name, seed in ((name, seed) for name in paths for seed in range(_SEEDS)):
        total = 0
        for number in range(batches):
            # No two draws share a key, whatever their path.
            key = (len(counts) * seed + list(paths).index(name)) * batches + number
            codes = compiled(programs[name])(learned[name], labels, keys(key), given)
            last = np.asarray(codes)[:, -_COUNTED:]
            total += np.stack([np.bincount(c, minlength=config.vocab_size) for c in last.T])
        counts[name].append(total / (batches * batch))
    return counts


def _parameters(config: ModelConfig) -> PyTree:
    params = unbox(init_parameters(config, jax.random.key(0)))
    head = params["head"]["kernel"]
    scale = _SPREAD / config.width**0.5
    params["head"]["kernel"] = scale * jax.random.normal(jax.random.key(1), head.shape, head.dtype)
    return params


def _fast(config: ModelConfig, weights: Weights, labels, keys, given) -> Int[Array, "B N"]:
    return generate(config, weights, labels, keys, given, SamplingConfig(guidance=1.0))


def _plain(
    config: ModelConfig,
    params: PyTree,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    given: Int[Array, "B n"],
) -> Int[Array, "B N"]:
    model = LASADGen(config)

    def step(carry, token):
        logits, cache = carry
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, token)
        code = draw(logits, token_keys, SamplingConfig()).astype(jnp.int32)
        return model.apply({"params": params}, code, cache, method="decode_step"), code

    carry = model.apply({"params": params}, labels, given, method="prefill")
    _, drawn = jax.lax.scan(step, carry, jnp.arange(given.shape[1], config.num_tokens))
    return jnp.concatenate([given, drawn.T], axis=1)
