"""Tokenizers as files with LlamaGen's tensor names and PyTorch's layout.

Read from torch files, as LlamaGen publishes them, or safetensors; written as safetensors.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from lasad_jax.files import whole_file
from lasad_jax.interop.state_dicts import Shapes, Tensors, check_shapes, read_tensors, refuse
from lasad_jax.models.tokenizer import abstract_tokenizer
from lasad_jax.models.tokenizer_config import TokenizerConfig

# Name in the file -> keys in the tree of parameters, shape in the file.
Layout = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]

_FIELD = "tokenizer"
_HINT = "fetch LlamaGen's vq_ds16_c2i.pt, or give a file that save_tokenizer wrote"
# A buffer of LlamaGen's training; nothing else reads it.
_CODEBOOK_USED, _CODEBOOK_USED_SIZE = "quantize.codebook_used", 65536
# Kernels (h, w, in, out) and (out, in, h, w); nothing else has four axes.
_TO_TORCH, _FROM_TORCH = (3, 2, 0, 1), (2, 3, 1, 0)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "embedding": "embedding.weight"}


def load_tokenizer(path: str | Path) -> tuple[TokenizerConfig, PyTree[np.ndarray]]:
    """Reads a tokenizer.

    Args:
      path: a .safetensors or a torch file, see `read_tensors`.

    Returns:
      The configuration, from the file's metadata or, without any, from the tensors' shapes;
      and the parameters of `VQTokenizer`, float32.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read_tensors`; a tensor that is missing,
        extra or of another shape.
    """
    path = Path(path)
    tensors, metadata = read_tensors(_FIELD, path, _HINT)
    tensors.pop(_CODEBOOK_USED, None)
    if "config" in metadata:
        config = _config_from_json(path, metadata["config"])
    else:
        config = _config_from_shapes(path, {name: x.shape for name, x in tensors.items()})
    layout = _layout(config)
    check_shapes(_FIELD, path, _shapes(layout), tensors)
    params = {keys: _from_torch(tensors[name]) for name, (keys, _) in layout.items()}
    return config, unflatten_dict(params)


def save_tokenizer(path: str | Path, config: TokenizerConfig, params: PyTree) -> None:
    """Writes a tokenizer so that the file is whole or not there at all.

    Args:
      path: ending in .safetensors; its folder is made if need be.
      config, params: of a `VQTokenizer`; stored as float32.

    Raises:
      ValueError: for another ending, or parameters that are not the configuration's.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"tokenizer: {path} must end in .safetensors, the format written")
    tensors = _to_tensors(params)
    check_shapes(_FIELD, path, _shapes(_layout(config)), tensors)
    tensors[_CODEBOOK_USED] = np.zeros(_CODEBOOK_USED_SIZE, np.float32)
    # One entry only: safetensors writes several in an order that changes from run to run.
    metadata = {"config": json.dumps(dataclasses.asdict(config))}
    with whole_file(path) as file:
        safetensors.numpy.save_file(tensors, file, metadata)


def fingerprint(config: TokenizerConfig, params: PyTree) -> str:
    """16 hex digits that tell apart tokenizers with other codes or other pictures.

    The start of the SHA-256 over the architecture (not the dtype of computing) and every
    tensor by order of name, in float32, little-endian.
    """
    architecture = dataclasses.asdict(config)
    del architecture["dtype"]
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(_to_tensors(params).items()):
        digest.update(f"{name}{tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4"))
    return digest.hexdigest()[:16]


def _layout(config: TokenizerConfig) -> Layout:
    def torch_shape(shape):
        return tuple(shape[axis] for axis in _TO_TORCH) if len(shape) == 4 else shape

    leaves = flatten_dict(abstract_tokenizer(config)).items()
    return {_torch_name(keys): (keys, torch_shape(leaf.shape)) for keys, leaf in leaves}


def _shapes(layout: Layout) -> Shapes:
    return {name: shape for name, (_, shape) in layout.items()}


def _torch_name(keys: tuple[str, ...]) -> str:
    """("encoder", "conv_blocks_0_res_1", "conv1", "kernel") -> its name in LlamaGen's files."""
    *modules, leaf = keys
    dotted = [re.sub(r"_(\d+)_?", r".\1.", module).rstrip(".") for module in modules]
    return ".".join([*dotted, _LEAVES[leaf]])


def _to_torch(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(_TO_TORCH) if x.ndim == 4 else x)


def _from_torch(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(_FROM_TORCH) if x.ndim == 4 else x)


def _to_tensors(params: PyTree) -> Tensors:
    flat = flatten_dict(params)
    return {_torch_name(keys): _to_torch(np.asarray(x, np.float32)) for keys, x in flat.items()}


def _config_from_json(path: Path, text: str) -> TokenizerConfig:
    try:
        values = json.loads(text)
        return TokenizerConfig(**values | {"multipliers": tuple(values["multipliers"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"tokenizer: the metadata of {path} holds no configuration of a tokenizer ({error})"
        ) from error


def _config_from_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> TokenizerConfig:
    """The only configuration that can have these shapes."""

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=0)

    levels = count(r"encoder\.conv_blocks\.(\d+)\.")
    needed = ["encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight"]
    firsts = [f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(levels)]
    ranks = dict.fromkeys([*needed, *firsts], 4) | {"quantize.embedding.weight": 2}
    refuse(
        _FIELD,
        path,
        [f"{name} is missing" for name in ranks if name not in shapes]
        + [
            f"{name} has shape {shapes[name]}, not {rank} axes"
            for name, rank in ranks.items()
            if len(shapes.get(name, range(rank))) != rank
        ],
    )
    width, channels = shapes["encoder.conv_in.weight"][:2]
    codebook_size, codebook_dim = shapes["quantize.embedding.weight"]
    try:
        return TokenizerConfig(
            channels=channels,
            width=width,
            multipliers=tuple(shapes[name][0] // max(width, 1) for name in firsts),
            encoder_blocks=count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            decoder_blocks=count(r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
            latent_channels=shapes["encoder.conv_out.weight"][0],
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
        )
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} has tensors of no known shape: {error}") from error
