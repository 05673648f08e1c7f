"""Whether fast decoding in bf16 draws codes as often as the plain path does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from lasad_jax.benchmarks import decoding, plain
from lasad_jax.benchmarks.compiling import compile_all, compiled
from lasad_jax.benchmarks.generators import GeneratorCase, random_batch
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.train_rows import Trainer, lower_step
from lasad_jax.config import SamplingConfig
from lasad_jax.models import LASADGen, ModelConfig, decoder
from lasad_jax.sampling.filters import draw

_SEEDS = 2
_STEPS = 200  # of training
# Standard deviation that all logits are brought to by one factor: a few codes of thousands are
# then likely, as after long training.
_SPREAD = 4.0


def agreement_row(case: GeneratorCase, mixer: str, draws: int) -> dict:
    """Total variation between what two paths draw as the last code of the same images.

    Half of each image is read in parallel, the rest code by code: by the decoder ("fast") and by
    the model's own `decode_step` ("plain"). The generator was trained for a moment, on codes of
    which every other one repeats the one before: fresh ones amplify the roundings of bf16 from
    layer to layer. All numbers are means over the images of the batch.

    Args:
      case, mixer: which generator.
      draws: codes drawn after each image, with each of two seeds and by each path.

    Returns:
      of the codes drawn, "plain" and "fast": between the histograms of two seeds; "between": from
      one path to the other, of different seeds, the larger of two. Of the probabilities
      themselves, "plain_error" and "fast_error": from those of the plain path in float32. Or
      "skipped".
    """
    row, config = {"case": str(case), "mixer": mixer}, case.model(mixer)
    try:
        logits = _last_logits(config, _trained(case, mixer), case.batch)
        drawn = {
            path: [_histogram(logits[path], _key(path, seed), draws) for seed in range(_SEEDS)]
            for path in ("plain", "fast")
        }
    except Exception as error:  # what does not fit says so; the others go on
        return row | {"skipped": one_line(error)}
    likely = {path: jax.nn.softmax(x) for path, x in logits.items()}
    fast, slow = drawn["fast"], drawn["plain"]
    return row | {
        "draws": draws,
        "plain": _variation(*slow),
        "fast": _variation(*fast),
        "between": max(_variation(fast[0], slow[1]), _variation(fast[1], slow[0])),
        "plain_error": _variation(likely["plain"], likely["exact"]),
        "fast_error": _variation(likely["fast"], likely["exact"]),
    }


def _variation(p: Float[Array, "B V"], q: Float[Array, "B V"]) -> float:
    return float(jnp.mean(jnp.sum(jnp.abs(p - q), axis=-1)) / 2)


def _key(path: str, seed: int) -> Key[Array, ""]:
    # No two draws share a key, whatever their path.
    return jax.random.fold_in(jax.random.key(seed), path == "fast")


@functools.partial(jax.jit, static_argnums=2)
def _histogram(logits: Float[Array, "B V"], key: Key[Array, ""], draws: int) -> Array:
    """The share of each code among so many drawn from every row (B, V)."""
    rows = jnp.arange(len(logits))

    def one(counts, key):
        codes = draw(logits, jax.random.uniform(key, rows.shape), SamplingConfig())
        return counts.at[rows, codes].add(1.0), None

    return jax.lax.scan(one, jnp.zeros_like(logits), jax.random.split(key, draws))[0] / draws


def _trained(case: GeneratorCase, mixer: str) -> PyTree:
    config, _ = plain.ways(case, mixer)["step"]
    trainer = Trainer(config, lower_step(config).compile())
    plain.losses(trainer, _STEPS)
    return trainer.params


def _last_logits(config: ModelConfig, params: PyTree, batch: int) -> dict[str, Float[Array, "B V"]]:
    """Logits of the last code by the plain path, the fast one, and the plain one in float32."""
    prepare = functools.partial(decoding.prepare, config, num_rows=batch)
    weights = jax.jit(prepare)(params)
    images = random_batch(config, batch, _STEPS)
    paths = {
        "plain": (_read_plain, params),
        "fast": (_read_fast, weights),
        "exact": (_read_exact, params),
    }
    programs = compile_all(
        {
            name: functools.partial(jax.jit(functools.partial(read, config)).lower, learned, images)
            for name, (read, learned) in paths.items()
        }
    )
    return {name: compiled(programs[name])(learned, images) for name, (_, learned) in paths.items()}


def _read_fast(
    config: ModelConfig, weights: decoder.Weights, images: dict[str, Int[Array, "B ..."]]
) -> Float[Array, "B V"]:
    given, rest = _halves(images["tokens"])
    features, cache = decoder.prefill(config, weights, images["labels"], given)
    carry = decoder.logits(weights, features), cache
    step = lambda carry, codes: (decoding.step(config, weights, codes, carry[1]), None)
    return jax.lax.scan(step, carry, rest.T)[0][0]


def _read_plain(
    config: ModelConfig, params: PyTree, images: dict[str, Int[Array, "B ..."]]
) -> Float[Array, "B V"]:
    run = functools.partial(LASADGen(config).apply, {"params": params})
    given, rest = _halves(images["tokens"])
    carry = run(images["labels"], given, method="prefill")
    step = lambda carry, codes: (run(codes, carry[1], method="decode_step"), None)
    return jax.lax.scan(step, carry, rest.T)[0][0]


def _read_exact(config: ModelConfig, *args) -> Float[Array, "B V"]:
    with jax.default_matmul_precision("highest"):
        return _read_plain(dataclasses.replace(config, dtype="float32"), *args)


def _halves(tokens: Int[Array, "B N"]) -> tuple[Int[Array, "B n"], Int[Array, "B m"]]:
    """What is read in parallel, and what code by code: all but the last."""
    half = tokens.shape[1] // 2
    return tokens[:, :half], tokens[:, half:-1]
