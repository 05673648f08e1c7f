"""Images to codes and back with a trained tokenizer: bytes in, bytes out, batch by batch."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, Integer, PyTree, UInt8

from lasad_jax.interop.tokenizer_files import fingerprint
from lasad_jax.models.tokenizer import VQTokenizer, check_images
from lasad_jax.models.tokenizer_config import TokenizerConfig


def bytes_to_floats(images: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Bytes as float32 in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def floats_to_bytes(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Floats around [-1, 1] as bytes: floor(clip(127.5 x + 128, 0, 255)), as in LlamaGen.

    Undoes `bytes_to_floats` exactly.
    """
    return jnp.floor(jnp.clip(127.5 * images + 128, 0, 255)).astype(jnp.uint8)


class TokenizerCodec:
    """A tokenizer at work on devices of this process.

    Attributes:
      config: of the tokenizer.
      batch_size: images computed at once, over all devices.
      downsampling: pixels per code along each side.
      vocab_size: number of codes.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        params: PyTree,
        *,
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Copies the parameters to every device, once.

        Args:
          config, params: of a `VQTokenizer`.
          batch_size: images computed at once, which bounds memory; rounded up to a multiple
            of the number of devices, which share each batch evenly.
          devices: to compute on; by default all of this process.

        Raises:
          ValueError: if batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} must be at least 1")
        devices = jax.local_devices() if devices is None else list(devices)
        self.config = config
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self.downsampling = config.downsampling
        self.vocab_size = config.codebook_size
        self._mesh = jax.make_mesh(
            (len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))
        model = VQTokenizer(config)

        def encode(params, images):
            z = model.apply({"params": params}, bytes_to_floats(images), method="encode")
            codes = model.apply({"params": params}, z, method="nearest")
            return codes.reshape(len(codes), -1)

        def decode(params, codes):
            vectors = model.apply({"params": params}, codes, method="lookup")
            return floats_to_bytes(model.apply({"params": params}, vectors, method="decode"))

        self._encode, self._decode = jax.jit(encode), jax.jit(decode)

    @functools.cached_property
    def fingerprint(self) -> str:
        """`lasad_jax.interop.tokenizer_files.fingerprint` of this tokenizer."""
        return fingerprint(self.config, self._params)

    def encode(self, images: UInt8[np.ndarray, "N h w channels"]) -> Int32[np.ndarray, "N L"]:
        """Codes in raster order of any number of images.

        Raises:
          ValueError: images that are not bytes, of another number of channels, or of sizes
            that the downsampling does not divide.
        """
        self._check(images)
        length = math.prod(size // self.downsampling for size in images.shape[1:3])
        codes = np.empty((len(images), length), np.int32)
        return self._in_batches(self.encode_batch, images, codes)

    def encode_batch(
        self, images: UInt8[np.ndarray, "batch_size h w channels"]
    ) -> Int32[Array, "batch_size L"]:
        """Starts encoding one full batch and returns at once; reading the result waits for it.

        Raises:
          ValueError: as `encode`, and for another number of images.
        """
        self._check(images)
        if len(images) != self.batch_size:
            raise ValueError(
                f"images: a batch of {len(images)} must have batch_size = {self.batch_size}; "
                "fill it up"
            )
        return self._start(self._encode, images)

    def decode(
        self, tokens: Integer[np.ndarray, "N L"], grid: tuple[int, int]
    ) -> UInt8[np.ndarray, "N h w channels"]:
        """Images of codes in raster order on a grid (R, C).

        Raises:
          ValueError: tokens that do not fill the grid, or that are no codes.
        """
        tokens = np.asarray(tokens)
        rows, columns = grid
        if tokens.ndim != 2 or rows < 1 or columns < 1 or tokens.shape[1] != rows * columns:
            raise ValueError(
                f"tokens: shape {tokens.shape} must be (N, {rows * columns}) for a grid of "
                f"{rows} x {columns}"
            )
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens: {tokens.dtype} must be integers")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(
                f"tokens: {tokens.min()} to {tokens.max()} must be within 0 to "
                f"{self.vocab_size - 1}, the tokenizer's codes"
            )
        height, width = rows * self.downsampling, columns * self.downsampling
        images = np.empty((len(tokens), height, width, self.config.channels), np.uint8)
        codes = tokens.astype(np.int32).reshape(len(tokens), rows, columns)
        return self._in_batches(functools.partial(self._start, self._decode), codes, images)

    def _check(self, images: np.ndarray) -> None:
        if images.dtype != np.uint8:
            raise ValueError(f"images: {images.dtype} must be uint8, 0 to 255")
        check_images(self.config, images.shape)

    def _start(self, compute: Callable[..., Array], rows: np.ndarray) -> Array:
        # The mesh of a training run around this call would not go with these devices.
        with jax.set_mesh(self._mesh):
            rows = jax.device_put(rows, NamedSharding(self._mesh, PartitionSpec("batch")))
            return compute(self._params, rows)

    def _in_batches(
        self, compute: Callable[[np.ndarray], Array], inputs: np.ndarray, outputs: np.ndarray
    ) -> np.ndarray:
        """Fills `outputs` with what `compute` makes of `inputs`, one batch ahead of reading."""
        waiting = []
        for start in range(0, len(inputs), self.batch_size):
            batch = inputs[start : start + self.batch_size]
            fill = self.batch_size - len(batch)
            padded = np.pad(batch, [(0, fill)] + [(0, 0)] * (batch.ndim - 1))
            waiting.append((outputs[start : start + self.batch_size], compute(padded)))
            if len(waiting) > 1:
                _read(*waiting.pop(0))
        for pair in waiting:
            _read(*pair)
        return outputs


def _read(target: np.ndarray, result: Array) -> None:
    target[...] = np.asarray(result)[: len(target)]
