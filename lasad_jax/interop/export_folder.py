"""An exported generator's folder: what is in it beside the weights, written and read."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from lasad_jax.config import Config, DataConfig, SamplingConfig
from lasad_jax.data.tokens import TOKENIZER_FILE
from lasad_jax.interop.generator_files import (
    CONFIG_FILE,
    MODEL_TYPE,
    architecture,
    load_generator,
    save_weights,
)
from lasad_jax.interop.tokenizer_files import fingerprint, load_tokenizer, save_tokenizer
from lasad_jax.models.tokenizer_config import TokenizerConfig

# Copied as they are: the model in plain PyTorch, and what transformers asks for around it.
_SAMPLING_FILE = "generation_config.json"
_CODE = ("modeling_lasadgen.py", "transformers_lasadgen.py")


@dataclasses.dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
      config: of the run.
      params: of the generator, unboxed.
      step: that they are of.
      averaged: whether they are the running average.
      class_names: one for each class, if known.
      tokenizer: what turns codes into images and its parameters; None where codes are pixels.
      dtype: that matrices are stored in.
    """

    config: Config
    params: PyTree
    step: int
    averaged: bool
    class_names: tuple[str, ...] | None
    tokenizer: tuple[TokenizerConfig, PyTree] | None
    dtype: str


def check_target(out: Path, *, force: bool) -> None:
    """Refuses a place that something else has.

    Raises:
      FileExistsError: something is there, without `force`.
      ValueError: it is no earlier export, which `force` must not remove.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise FileExistsError(f"out: {out} exists; give another folder, or --force to replace it")
    try:
        is_export = json.loads((out / CONFIG_FILE).read_text())["model_type"] == MODEL_TYPE
    except (OSError, ValueError, TypeError, KeyError):
        is_export = False
    if not is_export:
        raise ValueError(
            f"out: {out} is no earlier export, which is all that --force replaces; give another "
            "folder"
        )


def write_export(folder: Path, export: Export, *, shard_bytes: int) -> None:
    """Writes everything but the model card into an empty folder.

    Raises:
      ValueError: as `save_weights`.
    """
    model = export.config.model
    save_weights(folder, model, export.params, dtype=export.dtype, shard_bytes=shard_bytes)
    _write_json(folder / CONFIG_FILE, _config(export))
    _write_json(folder / _SAMPLING_FILE, _generation_config(export.config.sampling))
    for name in _CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    if export.tokenizer is not None:
        save_tokenizer(folder / TOKENIZER_FILE, *export.tokenizer)


class Exported(NamedTuple):
    """What an exported folder says of the run that it came from.

    Attributes:
      config: of a run with this model, its kind of data and its way to sample.
      params: of the generator, float32.
      tokenizer: as `Export.tokenizer`.
      class_names: as `Export.class_names`.
    """

    config: Config
    params: PyTree
    tokenizer: tuple[TokenizerConfig, PyTree] | None
    class_names: tuple[str, ...] | None


def read_export(folder: str | Path) -> Exported:
    """Reads what `python -m lasad_jax.export` wrote.

    Raises:
      FileNotFoundError, ValueError: a file that is missing, damaged, or no such file.
    """
    folder = Path(folder)
    model, params = load_generator(folder)
    tokenizer, data = None, DataConfig(levels=model.vocab_size)
    if (folder / TOKENIZER_FILE).exists():
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        data = DataConfig(source="codes", tokenizer=fingerprint(*tokenizer))
    config = Config(model=model, data=data, sampling=_read_sampling(folder))
    return Exported(config, params, tokenizer, _read_class_names(folder))


def _read_sampling(folder: Path) -> SamplingConfig:
    """How codes are drawn by default from an exported generator.

    Raises:
      ValueError: a file that does not say it, or a value that is none.
    """
    path = folder / _SAMPLING_FILE
    if not path.exists():
        return SamplingConfig()
    try:
        values = json.loads(path.read_text())
        values["guidance"] = values.pop("guidance_scale", SamplingConfig.guidance)
        names = {field.name for field in dataclasses.fields(SamplingConfig)}
        return SamplingConfig(**{name: x for name, x in values.items() if name in names})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"generator: {path} says no way to sample ({error})") from error


def _read_class_names(folder: Path) -> tuple[str, ...] | None:
    """The names of an exported generator's classes, of which config.json was read before."""
    names = json.loads((folder / CONFIG_FILE).read_text()).get("id2label")
    return None if names is None else tuple(names[key] for key in sorted(names, key=int))


def _config(export: Export) -> dict[str, Any]:
    module = "transformers_lasadgen"
    values = {
        "model_type": MODEL_TYPE,
        "architectures": ["LASADGenModel"],
        "auto_map": {
            "AutoConfig": f"{module}.LASADGenConfig",
            "AutoModel": f"{module}.LASADGenModel",
        },
        "dtype": export.dtype,
        **architecture(export.config.model),
    }
    if export.class_names is not None:
        values["id2label"] = dict(enumerate(export.class_names))
    return values


def _generation_config(sampling: SamplingConfig) -> dict[str, Any]:
    values = dataclasses.asdict(sampling)
    # Under the name that transformers knows, and with what it expects beside temperature.
    guidance = {"guidance_scale": values.pop("guidance")}
    return {"do_sample": sampling.temperature > 0, **guidance, **values}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
