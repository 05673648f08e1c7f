"""What a run carries from step to step, and how it begins."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from lasad_jax.config import Config, OptimizerConfig, RunConfig
from lasad_jax.models.generator import init_parameters
from lasad_jax.training.guard import Guard, new_guard
from lasad_jax.training.sharding import tree_shardings


@struct.dataclass
class TrainState:
    """Attributes:
    step: optimizer steps taken.
    params: parameters.
    opt_state: optax's state.
    ema: running average of the parameters; None without one.
    guard: against loss spikes.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None
    guard: Guard

    @property
    def best_params(self) -> PyTree:
        """The parameters to evaluate and to sample with: the average where there is one."""
        return self.params if self.ema is None else self.ema


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step."""
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, steps
        )
    return optax.linear_schedule(
        config.learning_rate if config.warmup_steps == 0 else 0.0,
        config.learning_rate,
        config.warmup_steps,
    )


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Clipping and AdamW; weight decay for matrices only."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            learning_rate(optimizer, config.steps),
            b1=optimizer.b1,
            b2=optimizer.b2,
            mu_dtype=optimizer.mu_dtype,
            weight_decay=optimizer.weight_decay,
            mask=_matrices,
        ),
    )


def _matrices(params: PyTree) -> PyTree:
    """True for matrices. By name: a norm's scale has several axes too, heads' and layers'."""
    names = ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(part, "key", None) in names for part in path), params
    )


def update_average(average: PyTree, params: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """The running average after a step, its memory short at first.

    It must forget the random initial values: the decay grows as (1 + step) / (10 + step).
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)


def unbox(tree: PyTree) -> PyTree:
    """The arrays without their axis names. (`nn.unbox` would put constraints on them.)"""
    is_box = lambda x: isinstance(x, nn.Partitioned)
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated."""
    return abstract(lambda: _new_state(config, _init(config)), mesh)


def init_state(config: Config, mesh: Mesh, given: Mapping[str, Array] | None = None) -> TrainState:
    """The state before the first step, created where it will live.

    Args:
      config: of the run.
      mesh: where the state is to live.
      given: parameters that are not initialised, by name, such as "blocks/mixer/q/kernel".
    """
    return init_program(config, mesh)(dict(given or {}))


def init_program(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """What `init_state` runs on the parameters that are given: a program that can be lowered."""

    def make(given):
        params = flatten_dict(unbox(_init(config)), sep="/")
        params |= {name: x.astype(params[name].dtype) for name, x in given.items()}
        return _new_state(config, unflatten_dict(params, sep="/"))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(make, out_shardings=shardings)


def _init(config: Config) -> PyTree:
    return init_parameters(config.model, jax.random.key(config.seed))


def _new_state(config: Config, params: PyTree) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema=params if config.optimizer.ema_decay else None,
        guard=new_guard(),
    )


def abstract(make_state: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """What `make_state` would return, boxes removed: shapes, dtypes and shardings alone."""
    boxed = jax.eval_shape(make_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def create(make_state: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """What `make_state` returns, boxes removed, created where it will live."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(make_state, mesh))
    return jax.jit(lambda: unbox(make_state()), out_shardings=shardings)()
