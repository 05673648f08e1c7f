"""The training step against its plain path: the same model, whole float32 logits."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.train_rows import Trainer, run_config
from lasad_jax.config import Config
from lasad_jax.models.generator import LASADGen
from lasad_jax.training.state import TrainState, make_optimizer
from lasad_jax.training.step import Batch, make_train_step

_LEARNING_RATE, _WARMUP = 3e-4, 20


def make_step(config: Config, *, plain: bool = False) -> Callable:
    """The step (state, batch) -> (state, metrics), or with `plain` what it has to agree with.

    The plain step takes optax's cross-entropy of all logits at once, in float32. It draws the
    same dropout, keeps no average and takes the batch whole.
    """
    if not plain:
        return make_train_step(config)
    model, optimizer = LASADGen(config.model, train=True), make_optimizer(config)

    def loss(params, batch, key):
        logits = model.apply(
            {"params": params}, batch["tokens"], batch["labels"], rngs={"dropout": key}
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["tokens"]
        )
        return losses.mean()

    def step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        value, gradient = jax.value_and_grad(loss)(state.params, batch, key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, None, state.guard), {"loss": value}

    return step


def ways(case: GeneratorCase, mixer: str) -> dict[str, tuple[Config, Callable]]:
    """Runs that should have the same losses, and what makes their steps.

    The plain path, the step, and the plain path rounded otherwise: the operator in its `chunked`
    form, which shows how far bf16 alone drives curves apart (not for softmax, which has one form).
    """
    forms = {"plain": ("auto", True), "step": ("auto", False)}
    if case.model(mixer).mixer == "lasad":
        forms["plain, chunked operator"] = ("chunked", True)
    found = {}
    for name, (form, plain) in forms.items():
        config = run_config(case, mixer, implementation=form)
        optimizer = dataclasses.replace(
            config.optimizer, learning_rate=_LEARNING_RATE, warmup_steps=_WARMUP
        )
        config = dataclasses.replace(config, optimizer=optimizer)
        found[name] = config, functools.partial(make_step, plain=plain)
    return found


def losses(trainer: Trainer, steps: int) -> list[float]:
    """Of the first steps, each on a batch of its own."""
    found = [trainer(trainer.batch(step))["loss"] for step in range(steps)]
    return [float(loss) for loss in jax.device_get(found)]


def largest_differences(curves: dict[str, list[float]]) -> dict[str, float]:
    """How far each curve strays from the first one at most."""
    (_, reference), *others = curves.items()
    return {
        name: max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        for name, losses in others
    }
