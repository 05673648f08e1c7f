"""The flags of commands that read images: `DataConfig`'s fields, in place of a run's."""

from typing import Any

from absl import flags

from lasad_jax.command import rows_and_columns
from lasad_jax.config.sections import FITS, IMAGE_SOURCES

_SIZE = "image_size"
_FIELDS = {
    "source": flags.DEFINE_enum(
        "source", None, IMAGE_SOURCES, "Where images come from; as in the run if unset."
    ),
    "directory": flags.DEFINE_string("directory", None, "The source's folder."),
    "name": flags.DEFINE_string("name", None, "Data set of tfds."),
    "labels": flags.DEFINE_string("labels", None, "CSV of folder."),
    _SIZE: flags.DEFINE_list("image_size", None, "Rows and columns, or one number for both."),
    "fit": flags.DEFINE_enum("fit", None, FITS, "How images are brought to that size."),
    "background": flags.DEFINE_integer(
        "background", None, "Grey behind transparent pixels.", 0, 255
    ),
}


def data_fields() -> dict[str, Any]:
    """The fields of `DataConfig` that flags set.

    Raises:
      ValueError: an image_size that is none.
    """
    values = {name: flag.value for name, flag in _FIELDS.items() if flag.value is not None}
    if _SIZE in values:
        values[_SIZE] = rows_and_columns(_SIZE, values[_SIZE])
    return values
