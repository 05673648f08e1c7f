"""Trains a generator: python -m lasad_jax.train --config=configs/digits.py --workdir=DIR

Any field can be set on the command line: --config.optimizer.learning_rate=3e-4. Running
the same command again goes on where the run stopped.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from lasad_jax.config import build_config
from lasad_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")


def main(argv: list[str]) -> None:
    """Reads the flags and trains."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; flags begin with --")
    try:
        train(build_config(_CONFIG.value), Path(_WORKDIR.value))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's own parsing, with an unknown --config field named in one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        sys.exit(f"--config: no such field: {error.args[0]}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lasad_jax"))
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse_flags)
