"""Trains a tokenizer: python -m lasad_jax.train_tokenizer --config=FILE --workdir=DIR

Any field can be set on the command line: --config.model.codebook_size=4096. Running the
same command again goes on where the run stopped.

On SIGTERM, at any moment, the run saves and exits with status 75 (EX_TEMPFAIL): the same command
goes on exactly where it was. An error is status 1.
"""

from absl import flags

from lasad_jax import command
from lasad_jax.config import TokenizerRunConfig
from lasad_jax.training import flags as training_flags

# Or --help would not show them.
flags.adopt_module_key_flags(command)
flags.adopt_module_key_flags(training_flags)

if __name__ == "__main__":
    training_flags.run_training(TokenizerRunConfig)
