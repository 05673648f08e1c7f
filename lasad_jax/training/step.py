"""One optimizer step and one held-out evaluation, as pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from lasad_jax.config import Config
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.generator import LASADGen
from lasad_jax.ops.kernels import choice
from lasad_jax.training import guard
from lasad_jax.training.cross_entropy import mean_loss, token_losses
from lasad_jax.training.state import TrainState, learning_rate, make_optimizer, update_average

Batch = dict[str, Array]

# A layer's parameters come together at once (`models.exchange`), of any size.
_GPU_OPTIONS = {"xla_gpu_all_gather_combine_threshold_bytes": 2**30}


def make_train_step(
    config: Config,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A function (state, batch) -> (state, metrics), for `jit_step`.

    The batch holds "tokens" (B, R * C) and "labels" (B,). Metrics are the mean loss in
    nats per token, the gradient's global norm before clipping, the learning rate, and what
    the guard against spikes tells.
    """
    model = LASADGen(config.model, train=True)
    optimizer = make_optimizer(config)
    schedule = learning_rate(config.optimizer, config.steps)
    accumulate, ema_decay = config.optimizer.accumulate, config.optimizer.ema_decay

    def loss(params, batch, key):
        x, kernel = model.apply(
            {"params": params},
            batch["tokens"],
            batch["labels"],
            rngs={"dropout": key},
            method="before_head",
        )
        return mean_loss(x, kernel, batch["tokens"])

    def loss_and_gradient(params, batch, key):
        if accumulate == 1:
            return jax.value_and_grad(loss)(params, batch, key)
        # Every micro-batch takes some rows of each device, so that no row moves.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total, part_and_key):
            part = jax.value_and_grad(loss)(params, *part_and_key)
            return jax.tree.map(jnp.add, total, part), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulate)))
        return jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        value, gradient = loss_and_gradient(state.params, batch, key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = update_average(ema, params, state.step, ema_decay)
        norm = optax.tree.norm(gradient)
        take, after = guard.judge(state.guard, value, norm, config.optimizer.spike_factor)
        kept = guard.choose(
            take, (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        )
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, *kept, after), metrics | guard.metrics(after)

    return train_step


def jit_step(step: Callable, state: PyTree) -> jax.stages.Wrapped:
    """A step (state, batch) -> (state, metrics) to be compiled, with the state donated.

    The new state lies where `state` does, arrays or shapes with their shardings.
    """
    options = _GPU_OPTIONS if choice.device().is_gpu else None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )


def make_eval_step(model_config: ModelConfig) -> Callable[[PyTree, Batch], tuple[Array, Array]]:
    """A function (params, batch) -> (summed loss of the images, number of images).

    An image's loss is its mean in nats per token; rows with "mask" 0 do not count.
    """
    model = LASADGen(model_config)

    def eval_step(params: PyTree, batch: Batch) -> tuple[Array, Array]:
        x, kernel = model.apply(
            {"params": params}, batch["tokens"], batch["labels"], method="before_head"
        )
        losses = token_losses(x, kernel, batch["tokens"]).mean(axis=-1)
        return jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"])

    return eval_step
