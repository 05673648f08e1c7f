"""What a generator is: the fields of `config.model`."""

import dataclasses

import jax.numpy as jnp

from lasad_jax.ops import IMPLEMENTATIONS

MIXERS = ("lasad", "softmax")
DECAYS = ("none", "sequence", "raster", "manhattan")
REMATS = ("none", "block", "lean", "cheap")
SWITCH = ("auto", "on", "off")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `LASADGen`.

    Attributes:
      vocab_size: number of codes V.
      num_classes: class labels are 0 to num_classes - 1; num_classes is the null class.
      grid: rows and columns (R, C) of an image's code grid.
      num_layers, width, num_heads: depth, D, H. The value dimension Dv is width / num_heads.
      key_dim: Dk per head; 0 means Dv for the softmax mixer and, for LASAD, half of it (filled up
        to a multiple of 8).
      ffn_width: hidden width of the feed-forward; 0 means LlamaGen's for the softmax mixer
        and, for LASAD, whatever gives both the same number of parameters.
      mixer: "lasad", or "softmax" (the baseline).
      decay: LASAD's decay family: "none", "sequence", "raster" or "manhattan".
      selective: add a learned, input-dependent decay (not with "manhattan").
      local_conv: causal 5x5 depthwise convolution on the grid before the feed-forward: "on",
        "off", or "auto": with LASAD, but not with softmax, since LlamaGen has none.
      rope: 2D rotary embedding of queries and keys.
      dropout: rate on the token embedding and on every residual branch.
      class_dropout: rate at which a label becomes the null class in training.
      remat: what the backward pass recomputes: "cheap" (what takes one pass over memory, not
        products, norms, the operator and the convolution), "lean" (the convolution too, which
        saves a number for each channel of a token and layer), "block" (everything within a
        block) or "none".
      unroll: layers that are compiled one by one between steps of the loop over layers; 0
        for all of them on a GPU, where the loop costs copies of what it stores (a tenth of a
        step), and one elsewhere. More layers take longer to compile.
      dtype: of activations and matrix products.
      param_dtype: of parameters.
      implementation: form of the operator (`lasad_jax.ops.linear_attention`).
    """

    vocab_size: int = 16384
    num_classes: int = 1000
    grid: tuple[int, int] = (16, 16)
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    key_dim: int = 0
    ffn_width: int = 0
    mixer: str = "lasad"
    decay: str = "raster"
    selective: bool = True
    local_conv: str = "auto"
    rope: bool = True
    dropout: float = 0.1
    class_dropout: float = 0.1
    remat: str = "cheap"
    unroll: int = 0
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    implementation: str = "auto"

    def __post_init__(self):
        choices = {
            "mixer": MIXERS,
            "decay": DECAYS,
            "remat": REMATS,
            "local_conv": SWITCH,
            "dtype": DTYPES,
            "param_dtype": DTYPES,
            "implementation": IMPLEMENTATIONS,
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"model.{name}: {value!r} is not one of {allowed}")
        for name in ("vocab_size", "num_classes", "num_layers", "width", "num_heads"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"model.{name}: {value} must be at least 1")
        for name in ("key_dim", "ffn_width", "unroll"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"model.{name}: {value} must be positive, or 0 for the default")
        for name in ("dropout", "class_dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"model.{name}: {value} must be in [0, 1)")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"model.grid: {self.grid} must be two positive sizes (rows, columns)")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.num_heads: {self.num_heads} does not divide model.width={self.width}"
            )
        if self.rope and self.query_dim % 4:
            raise ValueError(
                f"model.rope: 2D rotary embedding needs a key dimension that is a multiple of 4, "
                f"not {self.query_dim}; set model.key_dim or model.rope=False"
            )
        if self.mixer == "lasad" and self.selective and self.decay == "manhattan":
            raise ValueError(
                "model.selective: True cannot go with model.decay='manhattan', which is no "
                "single recurrence; set model.selective=False or another decay"
            )
        if self.mixer == "softmax" and self.query_dim != self.value_dim:
            raise ValueError(
                f"model.key_dim: {self.key_dim} must be 0 or {self.value_dim} with "
                "model.mixer='softmax'"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, R * C."""
        return self.grid[0] * self.grid[1]

    @property
    def value_dim(self) -> int:
        """Dv, the value dimension per head."""
        return self.width // self.num_heads

    @property
    def query_dim(self) -> int:
        """Dk, the query and key dimension per head."""
        if self.key_dim or self.mixer == "softmax":
            return self.key_dim or self.value_dim
        return min(self.value_dim, -(-self.value_dim // 16) * 8)

    @property
    def has_local_conv(self) -> bool:
        """What `local_conv` comes to."""
        return self.local_conv == "on" or (self.local_conv == "auto" and self.mixer == "lasad")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as JAX knows it."""
        return jnp.dtype(self.dtype)
