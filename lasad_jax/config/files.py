"""Configurations as users write them and as runs store them.

`default_config` shows the dataclasses as a locked `ml_collections.ConfigDict`, which
refuses unknown keys and wrong types by name, in config files and on the command line
alike; `build_config` turns one back.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from lasad_jax.config.runs import Config, RunConfig, TokenizerRunConfig

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)

# As written in config.json, so that a run says what it trained.
_KINDS = {Config: "generator", TokenizerRunConfig: "tokenizer"}


def default_config() -> ml_collections.ConfigDict:
    """A generator's fields at their defaults: the locked ConfigDict its config files start from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def default_tokenizer_config() -> ml_collections.ConfigDict:
    """The same for training a tokenizer."""
    return ml_collections.ConfigDict(dataclasses.asdict(TokenizerRunConfig())).lock()


def build_config(
    values: ml_collections.ConfigDict | Mapping[str, Any], cls: type[AnyConfig] = Config
) -> AnyConfig:
    """The typed configuration.

    Args:
      values: a ConfigDict or nested mapping; what is missing takes its default.
      cls: `Config` for a generator, `TokenizerRunConfig` for a tokenizer.

    Raises:
      ValueError: naming the field, its value and what would do.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return _replace(cls(), values, "config")


def _replace(default: Any, values: Mapping[str, Any], path: str) -> Any:
    """`default`, a dataclass, with the fields in `values` replaced after checking them."""
    names = [field.name for field in dataclasses.fields(default)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{path}.{unknown[0]}: unknown key; {path} has {sorted(names)}")
    types = typing.get_type_hints(type(default))
    changes = {}
    for name, value in values.items():
        where = f"{path}.{name}"
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: expected a section, got {value!r}")
            changes[name] = _replace(getattr(default, name), value, where)
        else:
            changes[name] = _checked(value, types[name], where)
    return dataclasses.replace(default, **changes)


def _checked(value: Any, wanted: Any, where: str) -> Any:
    """The value if it has the type; whole numbers do for floats and lists for tuples."""
    if typing.get_origin(wanted) is tuple:
        items, wanted = typing.get_args(wanted), tuple
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, tuple):
            if items[-1] is Ellipsis:
                items = items[:1] * len(value)
            if tuple(type(item) for item in value) != items:
                names = ", ".join(item.__name__ for item in items)
                raise ValueError(f"{where}: expected ({names}), got {value!r}")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}: expected {wanted.__name__}, got {value!r}")
    return value


def config_to_json(config: RunConfig) -> str:
    """As stored in a run directory."""
    values = {"kind": _KINDS[type(config)], **dataclasses.asdict(config)}
    return json.dumps(values, indent=2) + "\n"


def load_config(workdir: Path, cls: type[AnyConfig] = Config) -> AnyConfig:
    """The configuration that a run directory was made with.

    Args:
      workdir: the run.
      cls: of the run, as for `build_config`.

    Raises:
      FileNotFoundError: if there is no run in `workdir`.
      ValueError: if the run is of another kind.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"workdir: no run in {workdir} ({path.name} is missing)")
    values = json.loads(path.read_text())
    kind = values.pop("kind", _KINDS[Config])
    if kind != _KINDS[cls]:
        raise ValueError(f"workdir: {workdir} holds a {kind}'s run, not a {_KINDS[cls]}'s")
    return build_config(values, cls)
