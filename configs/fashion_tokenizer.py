"""A tokenizer for Fashion-MNIST, padded to 32x32: 8x8 of 4096 codes.

    python -m lasad_jax.train_tokenizer --config=configs/fashion_tokenizer.py \\
        --workdir=runs/fashion_tokenizer

Expect 30.6 dB PSNR on the test set at 99.9 % codebook usage, in 4 minutes on an H100.
The files come from Debian's package dataset-fashion-mnist; elsewhere set
--config.data.directory.
"""

import ml_collections

from lasad_jax.config import default_tokenizer_config


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = default_tokenizer_config()
    config.steps = 3000
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 1000
    config.sample_every = 1000
    config.save_every = 1000
    config.data.update(source="idx", directory="/usr/share/datasets/fashion-mnist")
    config.data.update(image_size=(32, 32), fit="pad", background=0)
    config.model.update(
        channels=1,
        width=64,
        multipliers=(1, 2, 4),
        codebook_size=4096,
        latent_channels=128,
        dtype="bfloat16",
    )
    config.augment.min_crop = 1.0
    config.optimizer.update(
        learning_rate=5e-4, schedule="cosine", warmup_steps=200, ema_decay=0.999
    )
    config.losses.update(perceptual_weight=0.0, adversarial_weight=0.0)
    return config
