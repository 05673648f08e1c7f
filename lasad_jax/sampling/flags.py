"""The flags of commands that draw from a run: which checkpoint, and `SamplingConfig`'s fields."""

from typing import Any

from absl import flags

SEED = flags.DEFINE_integer("seed", 0, "Seed of the images.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; the best by held-out loss if unset.")
RAW = flags.DEFINE_bool("raw", False, "Use the parameters themselves, not their average.")
BATCH = flags.DEFINE_integer("batch_size", 128, "Images drawn, and kept, at a time.", 1)
_FIELDS = {
    "guidance": flags.DEFINE_float("guidance", None, "Guidance scale; as configured if unset."),
    "guidance_schedule": flags.DEFINE_string(
        "guidance_schedule", None, "constant, linear or power-cosine."
    ),
    "guidance_power": flags.DEFINE_float("guidance_power", None, "Exponent of power-cosine."),
    "temperature": flags.DEFINE_float("temperature", None, "Temperature; 0 for the likeliest."),
    "top_k": flags.DEFINE_integer("top_k", None, "Draw among the k likeliest codes; 0 for all."),
    "top_p": flags.DEFINE_float("top_p", None, "Draw among codes of total probability p."),
}


def sampling_fields() -> dict[str, Any]:
    """The fields of `SamplingConfig` that flags set, to put in place of a run's."""
    values = {name: flag.value for name, flag in _FIELDS.items()}
    return {name: value for name, value in values.items() if value is not None}


def are_set() -> list[str]:
    """The names of the flags of this module that are given, for a command that draws nothing."""
    given = [flag.name for flag in (SEED, STEP, RAW, BATCH) if flag.present]
    return given + list(sampling_fields())
