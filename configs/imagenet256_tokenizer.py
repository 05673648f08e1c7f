"""LlamaGen's VQ-16 on ImageNet at 256x256: 16x16 of 16384 codes, 40 epochs.

    python -m lasad_jax.train_tokenizer --config=configs/imagenet256_tokenizer.py \\
        --workdir=runs/imagenet256_tokenizer --config.losses.vgg16=vgg16-397923af.pth \\
        --config.losses.lpips=vgg.pth

The published one reaches rFID 2.19, PSNR 20.8, SSIM 0.675 at 97 % codebook usage
(arXiv 2406.06525); this recipe has not been run to its end here. `tfds build imagenet2012`
prepares the images.
"""

import ml_collections

from lasad_jax.config import default_tokenizer_config

_EPOCHS = 40
_IMAGES = 1_281_167


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = default_tokenizer_config()
    config.steps = _EPOCHS * _IMAGES // config.batch_size
    config.log_every = 100
    config.eval_every = 5000
    config.sample_every = 5000
    config.save_every = 5000
    config.data.update(source="tfds", name="imagenet2012", image_size=(256, 256))
    config.model.dtype = "bfloat16"
    return config
