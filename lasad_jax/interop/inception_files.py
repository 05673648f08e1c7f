"""The weights of FID's Inception network, as PyTorch's ports of it publish them."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32

from lasad_jax.evaluation.features import Extractor
from lasad_jax.evaluation.inception import SIDE, Inception, inception_features
from lasad_jax.interop.state_dicts import Shapes, Tensors, check_shapes, read_tensors

# Of pt_inception-2015-12-05-6726825d.pth (pytorch-fid), byte for byte the same as
# weights-inception-2015-12-05-6726825d.pth (torch-fidelity).
FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

Keys = tuple[str, ...]

_FIELD = "inception"
_HINT = (
    "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth or torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth, fetched anew"
)
_EPSILON = 1e-3  # of the batch norms
_NORM = ("weight", "bias", "running_mean", "running_var")


def load_inception(path: str | Path, *, any_fingerprint: bool = False) -> Extractor:
    """Reads the network that FID is defined by.

    Args:
      path: pytorch-fid's or torch-fidelity's file (the same bytes), which takes torch to read.
      any_fingerprint: accept other bytes too, such as the same tensors in a .safetensors file.
        Numbers from other weights cannot be compared with published ones.

    Returns:
      An extractor of kind "inception"; see `inception_features`. Its fingerprint is over the
      file's tensors, whatever the file's format.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read_tensors`; another file's SHA-256; a
        tensor that is missing, extra or of another shape. Each names inception.
    """
    path = Path(path)
    if path.is_file() and not any_fingerprint:
        _check_bytes(path)
    tensors, _ = read_tensors(_FIELD, path, _HINT)
    # PyTorch's count of training steps, which some versions of it store.
    tensors = {k: x for k, x in tensors.items() if not k.endswith(".num_batches_tracked")}
    kernels = _kernels()
    check_shapes(_FIELD, path, _shapes(kernels), tensors)
    params = unflatten_dict({keys: _layer(keys, tensors) for keys in kernels})
    return Extractor(
        kind="inception",
        name=path.name,
        fingerprint=_fingerprint(tensors),
        image_shape=None,
        params=jax.tree.map(jnp.asarray, params),
        apply=inception_features,
    )


def _check_bytes(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != FILE_SHA256:
        raise ValueError(
            f"{_FIELD}: {path} is another file than FID's Inception, or a damaged one: its "
            f"SHA-256 begins with {found[:8]}, not {FILE_SHA256[:8]}; {_HINT}, or pass "
            "any_fingerprint=True if its weights are meant"
        )


def _kernels() -> dict[Keys, tuple[int, ...]]:
    """Each module of the network with the shape of its kernel."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    variables = jax.eval_shape(Inception().init, jax.random.key(0), images)
    leaves = flatten_dict(variables["params"]).items()
    return {keys[:-1]: leaf.shape for keys, leaf in leaves if keys[-1] == "kernel"}


def _shapes(kernels: dict[Keys, tuple[int, ...]]) -> Shapes:
    """Of the file's tensors: a linear map has weight and bias, a convolution weight and norm."""
    shapes = {}
    for keys, kernel in kernels.items():
        name, outputs = ".".join(keys), kernel[-1]
        if len(kernel) == 2:
            shapes |= {f"{name}.weight": kernel[::-1], f"{name}.bias": (outputs,)}
        else:
            shapes[f"{name}.conv.weight"] = tuple(kernel[axis] for axis in (3, 2, 0, 1))
            shapes |= {f"{name}.bn.{part}": (outputs,) for part in _NORM}
    return shapes


def _layer(keys: Keys, tensors: Tensors) -> dict[str, Float32[np.ndarray, "..."]]:
    """The parameters of a module. A norm by fixed statistics is a scale and a shift, which join
    the convolution before it."""
    name = ".".join(keys)
    if f"{name}.weight" in tensors:
        # The bias is unused, see `inception_features`.
        return {"kernel": tensors[f"{name}.weight"].T}
    scale, shift, mean, variance = (
        tensors[f"{name}.bn.{part}"].astype(np.float64) for part in _NORM
    )
    scale = scale / np.sqrt(variance + _EPSILON)
    kernel = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
    return {"kernel": np.float32(kernel), "bias": np.float32(shift - mean * scale)}


def _fingerprint(tensors: Tensors) -> str:
    """16 hex digits of the SHA-256 over every tensor by order of name, little-endian."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4"))
    return digest.hexdigest()[:16]
