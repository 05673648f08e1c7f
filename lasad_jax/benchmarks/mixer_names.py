"""Mixers named by what they have, such as raster+gate+conv+rope."""

from lasad_jax.models.config import DECAYS


def model_fields(arm: str, flag: str = "arms") -> dict[str, str | bool | int]:
    """Fields of `ModelConfig` of an arm; a ValueError names `flag`.

    Args:
      arm: a decay family or "softmax", then any of "gate" (content gate), "conv" (convolution
        before the feed-forward), "rope" (2D rotary embedding), "dkN" (N numbers per key), joined
        by "+".
      flag: where it was given.

    Raises:
      ValueError: for another word.
    """
    mixer, *parts = arm.split("+")
    if mixer not in (*DECAYS, "softmax"):
        raise ValueError(f"{flag}: {arm!r} must begin with one of {(*DECAYS, 'softmax')}")
    fields = {"mixer": "softmax"} if mixer == "softmax" else {"mixer": "lasad", "decay": mixer}
    fields |= {"selective": "gate" in parts} if mixer != "softmax" else {}
    fields |= {"local_conv": "on" if "conv" in parts else "off", "rope": "rope" in parts}
    for part in set(parts) - {"gate", "conv", "rope"}:
        if not (part.startswith("dk") and part[2:].isdigit()):
            raise ValueError(
                f"{flag}: {arm!r} has {part!r}, which is none of gate, conv, rope, dkN"
            )
        fields["key_dim"] = int(part[2:])
    return fields
