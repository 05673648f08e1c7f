"""ImageNet at 256x256, LlamaGen's recipe: 16x16 codes of its VQ tokenizer, 300 epochs.

    python -m lasad_jax.train --config=configs/imagenet256.py:B --workdir=runs/imagenet_B

B, L, XL, XXL and 3B are the sizes (from XL on for 50 epochs); the softmax baseline at equal size
is --config.model.mixer=softmax. LlamaGen-B reaches FID 5.46, L 3.81 (arXiv 2406.06525); no
LASADGen of these sizes has been trained yet. The codes are read from data.directory.
"""

import ml_collections

from lasad_jax.config import default_config
from lasad_jax.models import SIZES

_EPOCHS = {"B": 300, "L": 300, "XL": 50, "XXL": 50, "3B": 50}
_IMAGES = 1_281_167


def get_config(size: str = "B") -> ml_collections.ConfigDict:
    """The recipe at size B, L, XL, XXL or 3B."""
    if size not in _EPOCHS:
        raise ValueError(f"--config=configs/imagenet256.py:{size}: size is one of {[*_EPOCHS]}")
    config = default_config()
    config.batch_size = 256
    config.steps = _EPOCHS[size] * _IMAGES // config.batch_size
    config.log_every = 100
    config.eval_every = 5000
    config.sample_every = 5000
    config.save_every = 5000
    config.data.source = "codes"
    config.data.directory = "data/imagenet256_codes"
    config.model.update(vocab_size=16384, num_classes=1000, grid=(16, 16), **SIZES[size])
    config.num_samples = 64
    return config
