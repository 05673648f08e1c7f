"""Generators as files with PyTorch's names and layouts, which `modeling_lasadgen` lists.

A folder holds config.json and model.safetensors or, for large models, parts of it and their
index, as in the Hugging Face ecosystem.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from lasad_jax.interop.state_dicts import Tensors, check_shapes, read_tensors
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.models.sizes import ffn_width
from lasad_jax.training.state import unbox

MODEL_TYPE = "lasadgen"
STORED_DTYPES = ("float32", "bfloat16")
CONFIG_FILE = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HINT = "export the run again with python -m lasad_jax.export"
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# What config.json says of the architecture; the rest of a ModelConfig shapes no parameter.
_ARCHITECTURE = (
    "vocab_size",
    "num_classes",
    "grid",
    "num_layers",
    "width",
    "num_heads",
    "key_dim",
    "ffn_width",
    "mixer",
    "decay",
    "selective",
    "local_conv",
    "rope",
)


class Place(NamedTuple):
    """Where a tensor lies in the tree of parameters.

    Attributes:
      keys: the array's path.
      layer: index on its first axis; None where there is no axis of layers.
      shape: of the array, or of one layer of it.
    """

    keys: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it may be stored in less than float32; norms, rates and biases may not."""
        return self.keys[-1] in ("kernel", "embedding")

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """Of `shape`, in PyTorch's layout: outputs first, heads and their dimensions as one."""
        if self.keys[-1] != "kernel":
            return x
        return x.reshape(-1, self._outputs).T

    def from_torch(self, x: np.ndarray) -> np.ndarray:
        """Undoes `to_torch`."""
        return (x.T if self.keys[-1] == "kernel" else x).reshape(self.shape)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape that `to_torch` gives."""
        if self.keys[-1] != "kernel":
            return self.shape
        return self._outputs, math.prod(self.shape) // self._outputs

    @property
    def _outputs(self) -> int:
        # Only the mixer's output projection contracts more than the first axis.
        return self.shape[-1] if self.keys[-2] == "out" else math.prod(self.shape[1:])


def layout(config: ModelConfig) -> dict[str, Place]:
    """Every tensor's name and place, layer by layer."""
    leaves = flatten_dict(unbox(abstract_parameters(config)))
    single = [(keys, x.shape) for keys, x in leaves.items() if keys[0] != "blocks"]
    stacked = [(keys, x.shape[1:]) for keys, x in leaves.items() if keys[0] == "blocks"]
    places = {_name(keys): Place(keys, None, shape) for keys, shape in single}
    for layer in range(config.num_layers):
        for keys, shape in stacked:
            places[_name(("blocks", str(layer), *keys[1:]))] = Place(keys, layer, shape)
    return places


def _name(keys: tuple[str, ...]) -> str:
    return ".".join([*keys[:-1], _LEAVES.get(keys[-1], keys[-1])])


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model, every size written out."""
    fields = {name: getattr(config, name) for name in _ARCHITECTURE}
    return fields | {
        "grid": list(config.grid),
        "key_dim": config.query_dim,
        "ffn_width": ffn_width(config),
        "local_conv": config.has_local_conv,
    }


def read_config(folder: str | Path) -> ModelConfig:
    """The model of a folder; what `architecture` does not say has its default.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: one that describes no model of this kind, naming the field.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"generator: there is no file {path}; {_HINT}")
    try:
        values = json.loads(path.read_text())
        if values.get("model_type") != MODEL_TYPE:
            raise ValueError(f"model_type is not {MODEL_TYPE!r}")
        if missing := [name for name in _ARCHITECTURE if name not in values]:
            raise ValueError(f"{', '.join(missing)} missing")
        fields = {name: values[name] for name in _ARCHITECTURE}
        switch = {True: "on", False: "off"}[values["local_conv"]]
        config = ModelConfig(**fields | {"grid": tuple(values["grid"]), "local_conv": switch})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"generator: {path} describes no generator ({error}); {_HINT}") from error
    # What is the default is written as such.
    for name, value in {"key_dim": 0, "ffn_width": 0, "local_conv": "auto"}.items():
        default = dataclasses.replace(config, **{name: value})
        config = default if architecture(default) == architecture(config) else config
    return config


def save_weights(
    folder: str | Path,
    config: ModelConfig,
    params: PyTree,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the weights, in several files if they are larger than `shard_bytes` together.

    Args:
      folder: to write into.
      config, params: of a `LASADGen`, unboxed.
      dtype: of the matrices, one of `STORED_DTYPES`; all else is float32.
      shard_bytes: what a file holds at most, unless a single tensor is larger.

    Raises:
      ValueError: another dtype; parameters that are not the configuration's.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {STORED_DTYPES}")
    folder, places, arrays = Path(folder), layout(config), flatten_dict(params)
    _check_params(config, arrays)

    def tensor(place: Place) -> np.ndarray:
        x = arrays[place.keys] if place.layer is None else arrays[place.keys][place.layer]
        kind = jnp.bfloat16 if dtype == "bfloat16" and place.is_matrix else np.float32
        return np.ascontiguousarray(place.to_torch(np.asarray(x, kind)))

    size = lambda place: (
        math.prod(place.shape) * (2 if dtype == "bfloat16" and place.is_matrix else 4)
    )
    sizes = {name: size(place) for name, place in places.items()}
    shards = _split(sizes, shard_bytes)
    files = [_WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):
        tensors = {name: tensor(places[name]) for name in names}
        # Transformers refuses files that do not say so.
        safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})


def load_generator(folder: str | Path) -> tuple[ModelConfig, PyTree[np.ndarray]]:
    """Reads what `python -m lasad_jax.export` wrote.

    Returns:
      The configuration, see `read_config`, and the parameters, float32.

    Raises:
      FileNotFoundError, ValueError: a file that is missing or damaged; a tensor that is
        missing, extra or of another shape.
    """
    folder, config = Path(folder), read_config(folder)
    tensors: Tensors = {}
    for file in _weight_files(folder):
        tensors |= read_tensors("generator", folder / file, _HINT)[0]
    places = layout(config)
    shapes = {name: place.torch_shape for name, place in places.items()}
    check_shapes("generator", folder, shapes, tensors)
    arrays: dict[tuple[str, ...], Any] = {}
    for name, place in places.items():
        x = place.from_torch(tensors[name])
        if place.layer is None:
            arrays[place.keys] = x
        else:
            arrays.setdefault(place.keys, []).append(x)
    return config, unflatten_dict(
        {keys: np.stack(x) if isinstance(x, list) else x for keys, x in arrays.items()}
    )


def _weight_files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.exists():
        return [_WEIGHTS]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"generator: {index} is no index of tensors; {_HINT}") from error


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """The names in order, cut so that no part is larger than `most`, unless it is one tensor."""
    parts, room = [[]], most
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    return parts


def _check_params(config: ModelConfig, arrays: dict[tuple[str, ...], Any]) -> None:
    expected = flatten_dict(unbox(abstract_parameters(config)))
    shapes = {"/".join(keys): x.shape for keys, x in expected.items()}
    check_shapes("params", "the model", shapes, {"/".join(k): x for k, x in arrays.items()})
