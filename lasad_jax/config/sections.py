"""The sections that make up a run's configuration: names, defaults, types and checks."""

import dataclasses
from typing import Any

IMAGE_SOURCES = ("digits", "idx", "folder", "tfds")
SOURCES = (*IMAGE_SOURCES, "codes")
FITS = ("crop", "pad")
SCHEDULES = ("constant", "cosine")
MU_DTYPES = ("float32", "bfloat16")
GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")
RECONSTRUCTION_LOSSES = ("l2", "l1")


def at_least(section: str, config: Any, minimum: int, *names: str) -> None:
    """Refuses a field below `minimum`, by name."""
    for name in names:
        if not (value := getattr(config, name)) >= minimum:  # true of nan as well
            raise ValueError(f"{section}.{name}: {value} must be at least {minimum}")


def one_of(section: str, config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Refuses a field that is no choice, by name."""
    if (value := getattr(config, name)) not in allowed:
        raise ValueError(f"{section}.{name}: {value!r} is not one of {allowed}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become tokens.

    Attributes:
      source: "digits" (bundled with scikit-learn), "idx" (MNIST's file format), "folder"
        (image files, a class per sub-folder or a CSV of labels), "tfds" (a data set of
        tensorflow-datasets) or "codes" (stored by `python -m lasad_jax.tokenize`).
      directory: the folder that holds the files of `source`.
      name: the data set of "tfds", such as "imagenet2012".
      labels: a CSV file of "folder" with columns path and label, and if wanted split.
      image_size: rows and columns that images are brought to; (0, 0) leaves them as they
        are, which only sources of a single size allow.
      fit: "crop" (scale until the image covers `image_size` and cut from the centre, as
        in ADM) or "pad" (shrink what is larger, and centre it on a plain canvas).
      background: grey value of that canvas, and behind transparent pixels.
      levels: grey levels that a pixel is quantised to; the model's vocab_size. Not used by
        "codes".
      tokenizer: fingerprint that the tokenizer of "codes" must have; "" accepts any.
    """

    source: str = "digits"
    directory: str = ""
    name: str = ""
    labels: str = ""
    image_size: tuple[int, int] = (0, 0)
    fit: str = "crop"
    background: int = 255
    levels: int = 16
    tokenizer: str = ""

    def __post_init__(self):
        one_of("data", self, "source", SOURCES)
        one_of("data", self, "fit", FITS)
        rows, columns = self.image_size
        if min(rows, columns) < 0 or (rows == 0) != (columns == 0):
            raise ValueError(
                f"data.image_size: {self.image_size} must be two positive sizes (rows, columns), "
                "or (0, 0) to leave images as they are"
            )
        if not 0 <= self.background <= 255:
            raise ValueError(f"data.background: {self.background} must be 0 to 255")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"data.levels: {self.levels} must be 2 to 256; a pixel is a byte")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in LlamaGen.

    Attributes:
      learning_rate: peak rate.
      schedule: "constant", or "cosine" down to 0 at the last step.
      warmup_steps: linear warm-up from 0, in either schedule.
      b1, b2, weight_decay: AdamW; decay only for matrices, not for norms, biases or rates.
      mu_dtype: what the running mean of gradients is stored in; "bfloat16" spares two bytes for
        each parameter, and may be changed in a run.
      clip_norm: largest global gradient norm.
      accumulate: micro-batches per step; the batch is split, its mean gradient is the same.
      ema_decay: decay of the parameter average, reached gradually; 0 keeps no average.
      spike_factor: leave out an update whose gradient norm is above so many times its running
        level, once that is over 100 steps; 0 for never. One that is not finite is always
        left out.
      max_skips: updates left out in a row after which the run ends with an error.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    mu_dtype: str = "float32"
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.9999
    spike_factor: float = 10.0
    max_skips: int = 20

    def __post_init__(self):
        one_of("optimizer", self, "schedule", SCHEDULES)
        one_of("optimizer", self, "mu_dtype", MU_DTYPES)
        at_least("optimizer", self, 0, "learning_rate", "warmup_steps", "weight_decay")
        at_least("optimizer", self, 1, "accumulate", "max_skips")
        if self.spike_factor != 0:
            at_least("optimizer", self, 1, "spike_factor")
        if not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm: {self.clip_norm} must be positive")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"optimizer.{name}: {value} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh spans.

    -1 stands for all devices that are left, in one of the first three.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts that parameters are split into, each with its part of the batch too.
      tensor: parts that heads, feed-forward and vocabulary are split into.
      slice: groups of devices joined only by the data centre's network (the slices of a
        multi-slice TPU, GPU hosts), each with copies of the model and its part of the batch;
        -1 for as many as there are.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sizes[:3].count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"mesh: (data, fsdp, tensor, slice) = {sizes} must be positive, or -1 for slice "
                "and at most one of the others"
            )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn.

    Attributes:
      guidance: scale s of classifier-free guidance, u + s (c - u); 1 is none.
      guidance_schedule: how s grows from 1 over the tokens: "constant" (at once),
        "linear" or "power-cosine".
      guidance_power: exponent of the power-cosine schedule; larger rises later.
      temperature: divides the logits; 0 takes the likeliest code.
      top_k: draw among the k likeliest codes; 0 for all.
      top_p: draw among the fewest codes whose probability reaches p; 1 for all.
    """

    guidance: float = 2.0
    guidance_schedule: str = "constant"
    guidance_power: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        one_of("sampling", self, "guidance_schedule", GUIDANCE_SCHEDULES)
        at_least("sampling", self, 0, "guidance", "temperature", "top_k")
        if not self.guidance_power > 0:
            raise ValueError(f"sampling.guidance_power: {self.guidance_power} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: {self.top_p} must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How a tokenizer's training images vary.

    Attributes:
      min_crop: smallest share of the image's sides that a random crop keeps; 1 for no crop.
      flip: mirror every other image.
    """

    min_crop: float = 0.8
    flip: bool = True

    def __post_init__(self):
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"augment.min_crop: {self.min_crop} must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What a tokenizer is trained to minimise; weights are factors, 0 leaves a term out.

    Attributes:
      reconstruction: "l2" or "l1" distance of pixels.
      reconstruction_weight, codebook_weight, commitment_weight, entropy_weight: of the
        pixel distance, of moving codes to the encoder's vectors and those to their codes,
        and of the entropy term that spreads the use of codes.
      perceptual_weight: of LPIPS, for which `vgg16` must be given.
      vgg16: torchvision's VGG16 weights file; "" leaves LPIPS out.
      lpips: LPIPS's own weights of VGG16's channels; "" weighs them equally.
      adversarial_weight: of the PatchGAN's hinge loss.
      adversarial_start: step from which it counts and the discriminator learns.
      discriminator_width, discriminator_layers: of the PatchGAN.
      revive_every: steps after which codes that no image has used are moved to vectors of
        the current batch; 0 for never.
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    perceptual_weight: float = 1.0
    vgg16: str = ""
    lpips: str = ""
    adversarial_weight: float = 0.5
    adversarial_start: int = 20_000
    discriminator_width: int = 64
    discriminator_layers: int = 3
    revive_every: int = 100

    def __post_init__(self):
        one_of("losses", self, "reconstruction", RECONSTRUCTION_LOSSES)
        at_least("losses", self, 0, "reconstruction_weight", "codebook_weight")
        at_least("losses", self, 0, "commitment_weight", "entropy_weight", "perceptual_weight")
        at_least("losses", self, 0, "adversarial_weight", "adversarial_start", "revive_every")
        at_least("losses", self, 1, "discriminator_width", "discriminator_layers")
