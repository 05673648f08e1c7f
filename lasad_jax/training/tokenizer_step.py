"""One step of a tokenizer and its discriminator, and one evaluation, as pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from lasad_jax.config import LossConfig, TokenizerRunConfig
from lasad_jax.evaluation.reconstruction import count_codes, psnr, ssim
from lasad_jax.models.codec import bytes_to_floats, floats_to_bytes
from lasad_jax.models.discriminator import PatchDiscriminator
from lasad_jax.models.lpips import lpips
from lasad_jax.models.tokenizer import VQTokenizer, init_tokenizer
from lasad_jax.models.tokenizer_config import TokenizerConfig
from lasad_jax.training import tokenizer_losses as losses
from lasad_jax.training.guard import Guard, choose, new_guard
from lasad_jax.training.guard import judge as judge_update
from lasad_jax.training.guard import metrics as guard_metrics
from lasad_jax.training.state import learning_rate, make_optimizer, update_average

Batch = dict[str, Array]


@struct.dataclass
class TokenizerState:
    """Attributes:
    step: optimizer steps taken.
    params: of the tokenizer.
    opt_state: optax's state for them.
    ema: running average of the parameters; None without one.
    discriminator: its parameters; None without one.
    discriminator_opt_state: optax's state for them.
    usage: how often each code was used since dead ones were last revived.
    guard: against loss spikes.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None
    discriminator: PyTree | None
    discriminator_opt_state: PyTree | None
    usage: Int[Array, " V"]
    guard: Guard

    @property
    def best_params(self) -> PyTree:
        """The parameters to evaluate and to keep: the average where there is one."""
        return self.params if self.ema is None else self.ema


def new_state(config: TokenizerRunConfig) -> TokenizerState:
    """The state before the first step."""
    key, discriminator_key = jax.random.split(jax.random.key(config.seed))
    params = init_tokenizer(config.model, key)
    optimizer = make_optimizer(config)
    discriminator = discriminator_opt_state = None
    if config.losses.adversarial_weight:
        # The size of images shapes no parameter; this one is large enough for any depth.
        images = jax.ShapeDtypeStruct((1, 256, 256, config.model.channels), jnp.float32)
        discriminator = _discriminator(config).lazy_init(discriminator_key, images)["params"]
        discriminator_opt_state = optimizer.init(discriminator)
    return TokenizerState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=params if config.optimizer.ema_decay else None,
        discriminator=discriminator,
        discriminator_opt_state=discriminator_opt_state,
        usage=jnp.zeros((config.model.codebook_size,), jnp.int32),
        guard=new_guard(),
    )


def _discriminator(config: TokenizerRunConfig) -> PatchDiscriminator:
    return PatchDiscriminator(
        width=config.losses.discriminator_width,
        layers=config.losses.discriminator_layers,
        dtype=config.model.compute_dtype,
    )


def distance(
    config: LossConfig,
    vgg: PyTree | None,
    reconstruction: Float[Array, "B h w C"],
    images: Float[Array, "B h w C"],
) -> Float[Array, " B"]:
    """How far each reconstruction is from its image: pixels and, with `vgg`, LPIPS, weighted."""
    pixels = jax.vmap(losses.reconstruction_loss, (0, 0, None))(
        reconstruction, images, config.reconstruction
    )
    total = config.reconstruction_weight * pixels
    if vgg is not None:
        total += config.perceptual_weight * lpips(vgg, reconstruction, images)
    return total


def make_tokenizer_step(
    config: TokenizerRunConfig,
) -> Callable[[TokenizerState, Batch, PyTree | None], tuple[TokenizerState, dict[str, Array]]]:
    """A function (state, batch, vgg) -> (state, metrics); jit it with the state donated.

    The tokenizer and its discriminator take their steps at once, each against the other as
    it was before. The batch holds "images", uint8 (B, h, w, C); vgg is LPIPS's parameters,
    or None to leave it out.
    """
    weights = config.losses
    model, discriminator = VQTokenizer(config.model), _discriminator(config)
    optimizer, schedule = make_optimizer(config), learning_rate(config.optimizer, config.steps)
    judge = lambda params, images: discriminator.apply({"params": params}, images)

    def tokenizer_loss(params, judge_params, vgg, images, adversarial):
        out = model.apply({"params": params}, images)
        reconstruction = distance(weights, vgg, out.images, images).mean()
        total = (
            reconstruction
            + weights.codebook_weight * losses.codebook_loss(out.quantized, out.z)
            + weights.commitment_weight * losses.commitment_loss(out.z, out.quantized)
        )
        metrics = {"reconstruction": reconstruction}
        if weights.entropy_weight:
            metrics["entropy_loss"] = losses.entropy_loss(out.z, params["quantize"]["embedding"])
            total += weights.entropy_weight * metrics["entropy_loss"]
        if judge_params is not None:
            metrics["generator_loss"] = jax.lax.cond(
                adversarial,
                lambda fake: losses.generator_loss(judge(judge_params, fake)),
                lambda fake: jnp.zeros(()),
                out.images,
            )
            total += weights.adversarial_weight * metrics["generator_loss"]
        return total, (out, metrics | {"loss": total})

    def discriminator_update(params, opt_state, images, fake):
        def loss(params):
            return losses.hinge_discriminator_loss(judge(params, images), judge(params, fake))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        finite = jnp.isfinite(optax.tree.norm(gradient))
        return optax.apply_updates(params, updates), opt_state, jnp.where(finite, value, jnp.nan)

    def train_step(state: TokenizerState, batch: Batch, vgg: PyTree | None = None):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        images = bytes_to_floats(batch["images"])
        adversarial = state.step >= weights.adversarial_start
        gradient, (out, metrics) = jax.grad(tokenizer_loss, has_aux=True)(
            state.params, state.discriminator, vgg, images, adversarial
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if ema is not None:
            ema = update_average(ema, params, state.step, config.optimizer.ema_decay)

        judge_params, judge_opt_state = state.discriminator, state.discriminator_opt_state
        if judge_params is not None:
            judge_params, judge_opt_state, metrics["discriminator_loss"] = jax.lax.cond(
                adversarial,
                discriminator_update,
                lambda params, opt_state, images, fake: (params, opt_state, jnp.zeros(())),
                *(judge_params, judge_opt_state, images, out.images),
            )

        # Both steps are taken or neither, as each is against the other.
        norm = optax.tree.norm(gradient)
        finite = metrics["loss"] + metrics.get("discriminator_loss", 0.0)
        take, after = judge_update(state.guard, finite, norm, config.optimizer.spike_factor)
        params, opt_state, ema, judge_params, judge_opt_state = choose(
            take,
            (params, opt_state, ema, judge_params, judge_opt_state),
            (
                *(state.params, state.opt_state, state.ema),
                *(state.discriminator, state.discriminator_opt_state),
            ),
        )

        usage = state.usage + count_codes(out.codes, config.model.codebook_size)
        metrics["codes_in_use"] = jnp.mean(usage > 0)
        if weights.revive_every:
            due = take & ((state.step + 1) % weights.revive_every == 0)
            params, ema, usage = jax.lax.cond(
                due, _revive, lambda *unchanged: unchanged[:3], params, ema, usage, out.z, key
            )
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TokenizerState(
            state.step + 1, params, opt_state, ema, judge_params, judge_opt_state, usage, after
        ), metrics | guard_metrics(after)

    return train_step


def _revive(params, ema, usage, z, key):
    """Moves unused codes, in the average too, and starts counting again."""
    codebook, dead = losses.revive(
        params["quantize"]["embedding"], usage, z.reshape(-1, z.shape[-1]), key
    )
    put = lambda tree, new: tree | {"quantize": tree["quantize"] | {"embedding": new}}
    params = put(params, codebook)
    if ema is not None:
        average = ema["quantize"]["embedding"]
        ema = put(ema, jnp.where(dead[:, None], codebook, average))
    return params, ema, jnp.zeros_like(usage)


def make_tokenizer_eval_step(
    config: TokenizerConfig, loss_config: LossConfig
) -> Callable[[PyTree, Batch, PyTree | None], dict[str, Array]]:
    """A function (params, batch, vgg) -> sums over the images whose "mask" is 1.

    The sums are of "reconstruction" (the distance that training minimises), "psnr" (dB) and
    "ssim" of the reconstructions as bytes, "images", and "codes" (V,), uses of each code.
    """
    model = VQTokenizer(config)

    def eval_step(params: PyTree, batch: Batch, vgg: PyTree | None = None) -> dict[str, Array]:
        images, mask = bytes_to_floats(batch["images"]), batch["mask"]
        out = model.apply({"params": params}, images)
        seen = floats_to_bytes(out.images)
        return {
            "reconstruction": jnp.sum(distance(loss_config, vgg, out.images, images) * mask),
            "psnr": jnp.sum(psnr(seen, batch["images"]) * mask),
            "ssim": jnp.sum(ssim(seen, batch["images"]) * mask),
            "images": jnp.sum(mask),
            "codes": count_codes(
                jnp.where(mask[:, None, None] > 0, out.codes, config.codebook_size),
                config.codebook_size,
            ),
        }

    return eval_step
