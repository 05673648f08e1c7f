"""LlamaGen's class-conditional checkpoints as parameters of the softmax baseline.

The same network under other names (arXiv 2406.06525). Its linear maps are stored output first,
layer by layer; q, k and v are one matrix, in this order, each with its heads side by side.
RoPE has no parameters, so a file tells neither the grid nor, but for its size, the heads.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float32, PyTree

from lasad_jax.interop.state_dicts import Shapes, Tensors, check_shapes, read_tensors, refuse
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.sizes import SIZES, ffn_width

_FIELD = "checkpoint"
_HINT = "give LlamaGen's c2i_B_256.pt or another of its class-conditional checkpoints"
# What LlamaGen's model keeps beside its parameters, all of it computed anew.
_BUFFERS = re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\..+")

_TOKENS, _CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
_HIDDEN = "layers.0.feed_forward.w1.weight"


def load_llamagen(
    path: str | Path, *, grid: tuple[int, int], num_heads: int | None = None
) -> tuple[ModelConfig, PyTree[np.ndarray]]:
    """Reads a checkpoint.

    Args:
      path: a torch file or a .safetensors, see `read_tensors`.
      grid: (R, C) of the codes it was trained on: (16, 16) at 256 pixels, (24, 24) at 384.
      num_heads: H; by default that of the only size in `SIZES` with its depth and width.

    Returns:
      The configuration, from the tensors' shapes, and the parameters of `LASADGen`, float32.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read_tensors`; a tensor that is missing,
        extra or of another shape; unknown heads.
    """
    tensors, _ = read_tensors(_FIELD, path, _HINT)
    tensors = {name: x for name, x in tensors.items() if not _BUFFERS.fullmatch(name)}
    shapes = {name: x.shape for name, x in tensors.items()}
    config = _config_from_shapes(path, shapes, grid, num_heads)
    check_shapes(_FIELD, path, llamagen_shapes(config), tensors)
    return config, _parameters(config, tensors)


def llamagen_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes in LlamaGen's checkpoint of a softmax generator."""
    width, hidden = config.width, ffn_width(config)
    layer = {
        "attention.wqkv": (3 * width, width),
        "attention.wo": (width, width),
        "feed_forward.w1": (hidden, width),
        "feed_forward.w3": (hidden, width),
        "feed_forward.w2": (width, hidden),
        "attention_norm": (width,),
        "ffn_norm": (width,),
    }
    return {
        _CLASSES: (config.num_classes + 1, width),
        _TOKENS: (config.vocab_size, width),
        **{
            f"layers.{i}.{name}.weight": shape
            for i in range(config.num_layers)
            for name, shape in layer.items()
        },
        "norm.weight": (width,),
        "output.weight": (config.vocab_size, width),
    }


def _config_from_shapes(
    path: str | Path, shapes: Shapes, grid: tuple[int, int], num_heads: int | None
) -> ModelConfig:
    """The only configuration that can have these shapes."""
    needed = (_CLASSES, _TOKENS, _HIDDEN)
    refuse(
        _FIELD,
        path,
        [f"{name} is missing" for name in needed if name not in shapes]
        + [
            f"{name} has shape {shapes[name]}, not 2 axes"
            for name in needed
            if len(shapes.get(name, (0, 0))) != 2
        ],
    )
    vocab_size, width = shapes[_TOKENS]
    found = (re.match(r"layers\.(\d+)\.", name) for name in shapes)
    num_layers = len({match[1] for match in found if match})
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            num_classes=shapes[_CLASSES][0] - 1,
            grid=grid,
            num_layers=num_layers,
            width=width,
            num_heads=_known_heads(num_layers, width) if num_heads is None else num_heads,
            mixer="softmax",
        )
    except ValueError as error:
        raise ValueError(f"{_FIELD}: {path} makes no generator: {error}") from error
    hidden = shapes[_HIDDEN][0]
    # Left at the default where that is it, as in the configurations that go on from here.
    return config if hidden == ffn_width(config) else dataclasses.replace(config, ffn_width=hidden)


def _known_heads(num_layers: int, width: int) -> int:
    heads = {(size["num_layers"], size["width"]): size["num_heads"] for size in SIZES.values()}
    if (num_layers, width) not in heads:
        raise ValueError(
            f"num_heads: not known for {num_layers} layers of width {width}, which is none of "
            f"the sizes {', '.join(SIZES)}; give it"
        )
    return heads[num_layers, width]


def _parameters(config: ModelConfig, tensors: Tensors) -> PyTree[np.ndarray]:
    """The tensors where the model has them; they leave `tensors`, so that memory holds one set."""
    heads = (config.width, config.num_heads, config.value_dim)

    def layers(name: str, convert: Callable = np.asarray) -> Float32[np.ndarray, "layers ..."]:
        names = (f"layers.{i}.{name}.weight" for i in range(config.num_layers))
        return np.stack([convert(tensors.pop(name)) for name in names])

    qkv = layers("attention.wqkv", lambda x: x.T.reshape(config.width, 3, *heads[1:]))
    flat = {
        "token_embedding/embedding": tensors.pop(_TOKENS),
        "class_embedding/embedding": tensors.pop(_CLASSES),
        "blocks/mixer_norm/scale": layers("attention_norm"),
        **{f"blocks/mixer/{name}/kernel": qkv[:, :, i] for i, name in enumerate("qkv")},
        "blocks/mixer/out/kernel": layers(
            "attention.wo", lambda x: x.T.reshape(*heads[1:], config.width)
        ),
        "blocks/ffn_norm/scale": layers("ffn_norm"),
        "blocks/ffn/gate/kernel": layers("feed_forward.w1", np.transpose),
        "blocks/ffn/up/kernel": layers("feed_forward.w3", np.transpose),
        "blocks/ffn/down/kernel": layers("feed_forward.w2", np.transpose),
        "final_norm/scale": tensors.pop("norm.weight"),
        "head/kernel": tensors.pop("output.weight").T,
    }
    return unflatten_dict(flat, sep="/")
