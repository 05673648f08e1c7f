"""A tokenizer's run of a few seconds; also a config file for subprocesses."""

import ml_collections

from lasad_jax.config import TokenizerRunConfig, build_config, default_tokenizer_config


def get_config() -> ml_collections.ConfigDict:
    config = default_tokenizer_config()
    config.update(steps=6, batch_size=16, log_every=1, eval_every=0, sample_every=0, save_every=3)
    config.num_samples = 10
    config.data.update(source="digits", image_size=(8, 8))
    config.model.update(
        channels=1,
        width=32,
        multipliers=(1, 1),
        encoder_blocks=1,
        decoder_blocks=1,
        latent_channels=8,
        codebook_size=16,
        codebook_dim=4,
    )
    config.augment.min_crop = 0.8
    config.optimizer.update(learning_rate=1e-3, ema_decay=0.9)
    config.losses.update(
        perceptual_weight=0.0,
        adversarial_start=3,
        discriminator_width=8,
        discriminator_layers=1,
        revive_every=2,
    )
    return config


def tiny_tokenizer_config(**overrides) -> TokenizerRunConfig:
    """Overrides are fields, or dicts of a section's fields."""
    config = get_config()
    config.update(overrides)
    return build_config(config, TokenizerRunConfig)
