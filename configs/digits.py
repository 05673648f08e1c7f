"""Handwritten digits, scikit-learn's 1,797 of 8x8 pixels, on two CPU cores in 3 minutes.

    python -m lasad_jax.train --config=configs/digits.py --workdir=runs/digits

Expect 1.62 bits per pixel on the held-out digits.
"""

import ml_collections

from lasad_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = default_config()
    config.steps = 600
    config.batch_size = 64
    config.log_every = 20
    config.eval_every = 100
    config.sample_every = 300
    config.save_every = 100
    config.data.source = "digits"
    config.data.levels = 16
    config.model.update(
        vocab_size=16,
        num_classes=10,
        grid=(8, 8),
        num_layers=4,
        width=64,
        num_heads=2,
        dtype="float32",
    )
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=100, ema_decay=0.99)
    config.sampling.guidance = 2.0
    return config
