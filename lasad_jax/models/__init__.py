"""The generator: LlamaGen's network around a LASAD or softmax mixer."""

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.generator import LASADGen, count_parameters
from lasad_jax.models.sizes import SIZES

__all__ = ["SIZES", "LASADGen", "ModelConfig", "count_parameters"]
