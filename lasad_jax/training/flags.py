"""What the training commands share: flags, and ending early."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lasad_jax.command import run
from lasad_jax.config import RunConfig, build_config
from lasad_jax.training.loop import train
from lasad_jax.training.peers import Peers
from lasad_jax.training.preemption import Preemption
from lasad_jax.training.profile import Profile

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
_PROFILE = flags.DEFINE_string(
    "profile", "", "START:STOP: write a trace of these steps to the run's profile/."
)


def run_training(cls: type[RunConfig]) -> None:
    """A training command's whole work, for configurations of a kind."""

    def main():
        config, profile = build_config(_CONFIG.value, cls), Profile.parse(_PROFILE.value)
        with Preemption(Peers()) as preemption:
            train(config, Path(_WORKDIR.value), preemption=preemption, profile=profile)

    flags.mark_flags_as_required(["config", "workdir"])
    run(main)
