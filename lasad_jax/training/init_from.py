"""Beginning a run with another run's parameters: all that have the same name and shape.

So the class embeddings of other classes, or the feed-forward of another width, begin afresh,
and another grid, which shapes no parameter, changes nothing. A softmax run gives a LASAD one
what both have, and the other way round.
"""

import dataclasses
from pathlib import Path

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array

from lasad_jax.config import Config, load_config
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.training.checkpoints import Checkpoints, has_checkpoint
from lasad_jax.training.state import abstract_state, unbox

_FIELD = "config.init_from"


@dataclasses.dataclass(frozen=True)
class Source:
    """The run that `config.init_from` names.

    Attributes:
      workdir, config: of that run.
      step: of its checkpoint with the best held-out loss.
      theirs, ours: names and shapes of the parameters there and here.
    """

    workdir: Path
    config: Config
    step: int
    theirs: dict[str, tuple[int, ...]]
    ours: dict[str, tuple[int, ...]]

    @property
    def shared(self) -> list[str]:
        """Names of the parameters that are loaded."""
        return [name for name, shape in self.ours.items() if self.theirs.get(name) == shape]

    def load(self, mesh: Mesh) -> dict[str, Array]:
        """The shared parameters by name, their average where there is one, on a mesh."""
        checkpoints = Checkpoints(self.workdir, read_only=True)
        state = checkpoints.restore(self.step, abstract_state(self.config, mesh))
        params = flatten_dict(state.best_params, sep="/")
        return {name: params[name] for name in self.shared}

    def report(self) -> str:
        """What is and what is not loaded, by name and shape; a line for each parameter."""
        shared, ours, theirs = set(self.shared), self.ours, self.theirs
        lines = [
            f"init_from: {len(shared)} of {len(ours)} parameters from step {self.step} of "
            f"{self.workdir}"
        ]
        for name, shape in ours.items():
            if name in shared:
                lines.append(f"  loaded      {name} {shape}")
            else:
                why = f"there it is {theirs[name]}" if name in theirs else "there is none there"
                lines.append(f"  not loaded  {name} {shape}: {why}")
        unused = (f"  not used    {name} {theirs[name]}" for name in theirs if name not in ours)
        return "\n".join([*lines, *unused])


def open_source(config: Config) -> Source:
    """Looks at the run that `config.init_from` names.

    Raises:
      ValueError: it is no generator's run, has no checkpoint, or shares no parameter.
    """
    workdir = Path(config.init_from)
    try:
        their_config = load_config(workdir)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{_FIELD}: {config.init_from!r} is no generator's run ({error}); name a run "
            "directory of lasad_jax.train or lasad_jax.import_llamagen"
        ) from error
    if not has_checkpoint(workdir):
        raise ValueError(
            f"{_FIELD}: the run in {config.init_from!r} has no checkpoint yet; train it up to its "
            "first one, or name another"
        )
    step = Checkpoints(workdir, read_only=True).best_step()
    source = Source(workdir, their_config, step, _shapes(their_config.model), _shapes(config.model))
    if not source.shared:
        raise ValueError(
            f"{_FIELD}: no parameter of the run in {config.init_from!r} has the shape of one here; "
            f"its model.width is {their_config.model.width}, here it is {config.model.width}; "
            "set config.model as there, or clear the field"
        )
    return source


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    flat = flatten_dict(unbox(abstract_parameters(config)), sep="/")
    return {name: flat[name].shape for name in sorted(flat)}
