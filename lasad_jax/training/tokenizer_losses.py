"""What a VQ tokenizer is trained to minimise, as pure functions; and dead codes revived.

The encoder's vectors z and the codes chosen for them are (B, R, C, d), of unit length, as
in LlamaGen (arXiv 2406.06525). Losses are float32 scalars.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lasad_jax.config.sections import RECONSTRUCTION_LOSSES
from lasad_jax.models.quantizer import l2_normalize

_EXACT = jax.lax.Precision.HIGHEST
_MAX_AFFINITIES = 2**26  # 256 MB of float32
_REPEAT_NOISE = 1e-3


def reconstruction_loss(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], kind: str
) -> Float[Array, ""]:
    """Mean distance of pixels: squared ("l2") or absolute ("l1").

    Raises:
      ValueError: another kind.
    """
    difference = a.astype(jnp.float32) - b.astype(jnp.float32)
    if kind == "l2":
        return jnp.mean(jnp.square(difference))
    if kind == "l1":
        return jnp.mean(jnp.abs(difference))
    raise ValueError(f"losses.reconstruction: {kind!r} is not one of {RECONSTRUCTION_LOSSES}")


def codebook_loss(
    quantized: Float[Array, "B R C d"], z: Float[Array, "B R C d"]
) -> Float[Array, ""]:
    """Moves codes to the encoder's vectors: |quantized - sg(z)|^2, mean over all entries
    (VQ-VAE, arXiv 1711.00937, equation 3; sg stops the gradient)."""
    return reconstruction_loss(quantized, jax.lax.stop_gradient(z), "l2")


def commitment_loss(
    z: Float[Array, "B R C d"], quantized: Float[Array, "B R C d"]
) -> Float[Array, ""]:
    """Keeps the encoder's vectors at their codes: |z - sg(quantized)|^2, mean over all entries
    (VQ-VAE, arXiv 1711.00937, equation 3; sg stops the gradient)."""
    return reconstruction_loss(z, jax.lax.stop_gradient(quantized), "l2")


def entropy_loss(
    z: Float[Array, "B R C d"], codebook: Float[Array, "V d"], temperature: float = 0.01
) -> Float[Array, ""]:
    """Makes each vector sure of its code and all of them use the whole codebook.

    With p_i = softmax_v(-|z_i - e_v|^2 / temperature) over the codes e_v: the mean over i of
    the entropy of p_i, less the entropy of the mean p, in nats; from -log V to 0 (MaskGIT and
    LlamaGen; without the 1e-5 that they add in the logarithm, which is not small against 1/V).

    The B x R x C x V affinities are made a few places at a time, and again for the gradient,
    so that no more than about 256 MB of them exist; more only if B x V alone is.

    Args:
      z: unit vectors.
      codebook: vectors of any length, normalised here.
      temperature: of the softmax, positive.
    """
    d = z.shape[-1]
    z = z.astype(jnp.float32).reshape(z.shape[0], -1, d)
    codebook = l2_normalize(codebook)
    half_square = jnp.sum(jnp.square(codebook), -1) / 2
    B, places, _ = z.shape
    # Places and not images a few at a time: the images may be split over devices.
    limit = max(1, _MAX_AFFINITIES // (B * len(codebook)))
    together = max(n for n in range(1, min(limit, places) + 1) if places % n == 0)

    def add(sums, part):
        # The squared distance, less |z|^2: the softmax does not see what codes share.
        affinity = jnp.einsum("bpd,vd->bpv", part, codebook, precision=_EXACT) - half_square
        log_p = jax.nn.log_softmax(affinity * (2 / temperature))
        p = jnp.exp(log_p)
        entropy, p_sum = sums
        return (entropy - jnp.sum(p * log_p), p_sum + jnp.sum(p, (0, 1))), None

    parts = z.reshape(B, -1, together, d).swapaxes(0, 1)
    start = (jnp.zeros(()), jnp.zeros(len(codebook)))
    (entropy, p_sum), _ = jax.lax.scan(jax.checkpoint(add), start, parts)
    mean_p = p_sum / (B * places)
    # A code out of reach of all has p = 0 in float32, where the logarithm has no gradient.
    log_mean_p = jnp.log(jnp.maximum(mean_p, jnp.finfo(jnp.float32).tiny))
    return entropy / (B * places) + jnp.sum(mean_p * log_mean_p)


def hinge_discriminator_loss(
    real_logits: Float[Array, "*patches"], fake_logits: Float[Array, "*patches"]
) -> Float[Array, ""]:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2 (VQGAN, arXiv 2012.09841)."""
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def generator_loss(fake_logits: Float[Array, "*patches"]) -> Float[Array, ""]:
    """What the tokenizer minimises against its discriminator: -mean of its logits."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def revive(
    codebook: Float[Array, "V d"],
    usage_counts: Int[Array, " V"],
    z_flat: Float[Array, "M d"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "V d"], Bool[Array, " V"]]:
    """Moves codes that were never used to vectors that the encoder made just now.

    Each dead code gets another row of z_flat, drawn at random and normalised. Where there
    are more dead codes than rows, rows serve again with noise of 0.001 per entry, so that no
    two codes are the same. The result does not depend on how arrays are split over devices.

    Args:
      codebook: (V, d).
      usage_counts: (V,), how often each code was used; 0 is dead.
      z_flat: (M, d), the encoder's vectors.
      key: of the draw.

    Returns:
      The new codebook, of the old one's dtype, and which codes were dead.
    """
    M = len(z_flat)
    row_key, noise_key = jax.random.split(key)
    dead = usage_counts == 0
    rank = jnp.cumsum(dead) - 1  # of a dead code among the dead
    rows = jax.random.permutation(row_key, M)[rank % M]
    noise = jax.random.normal(noise_key, codebook.shape) * _REPEAT_NOISE
    fresh = l2_normalize(z_flat)[rows] + jnp.where(rank >= M, 1.0, 0.0)[:, None] * noise
    new = jnp.where(dead[:, None], l2_normalize(fresh).astype(codebook.dtype), codebook)
    return new, dead
