"""Trains a tokenizer: python -m lasad_jax.train_tokenizer --config=FILE --workdir=DIR

Any field can be set on the command line: --config.model.codebook_size=4096. Running the
same command again goes on where the run stopped.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lasad_jax.command import run
from lasad_jax.config import TokenizerRunConfig, build_config
from lasad_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")

if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run(lambda: train(build_config(_CONFIG.value, TokenizerRunConfig), Path(_WORKDIR.value)))
