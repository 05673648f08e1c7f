"""What transformers' AutoModel asks for around `modeling_lasadgen`."""

import dataclasses

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .modeling_lasadgen import LASADGen, ModelConfig, SamplingConfig


class LASADGenConfig(PretrainedConfig):
    """config.json; the architecture's fields are those of `ModelConfig`."""

    model_type = "lasadgen"


class LASADGenModel(PreTrainedModel):
    """A `LASADGen`, as attribute `model`."""

    config_class = LASADGenConfig
    base_model_prefix = "model"
    # Parts of parameters' names: all that `is_matrix` denies.
    _keep_in_fp32_modules_strict = (
        "norm",
        "mixer_norm",
        "ffn_norm",
        "final_norm",
        "rate",
        "row_rate",
        "column_rate",
        "bias",
    )

    def __init__(self, config: LASADGenConfig):
        super().__init__(config)
        self.model = LASADGen(ModelConfig.from_dict(config.to_dict()))
        self.post_init()

    @classmethod
    def can_generate(cls) -> bool:
        """So that generation_config.json is read."""
        return True

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """As `LASADGen.forward`."""
        return self.model(codes, labels)

    def generate(self, labels: Tensor, given: Tensor | None = None, **options) -> Tensor:
        """As `LASADGen.generate`; defaults are those of generation_config.json."""
        fields = (field.name for field in dataclasses.fields(SamplingConfig))
        defaults = {name: getattr(self.generation_config, name, None) for name in fields}
        defaults = {name: value for name, value in defaults.items() if value is not None}
        return self.model.generate(labels, given, **defaults | options)
