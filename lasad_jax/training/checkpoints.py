"""Checkpoints of the whole training state, written by Orbax in the background."""

from pathlib import Path

import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from lasad_jax.config import Config, RunConfig, config_to_json, load_config
from lasad_jax.files import whole_file
from lasad_jax.training.state import abstract_state


class Checkpoints:
    """The checkpoints/ folder of a run: the newest few and the best by held-out loss."""

    def __init__(self, workdir: Path, *, keep_last: int = 2, read_only: bool = False):
        held_out_loss = lambda metrics: metrics["held_out_loss"]
        best = checkpoint_managers.BestN(
            get_metric_fn=held_out_loss,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        keep = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep_last), best]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            # The policy decides; without this too, Orbax does not write metrics to disk.
            best_fn=held_out_loss,
            best_mode="min",
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # What read_only means anyway; Orbax warns where it is left to say so itself.
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
        )
        self._manager = ocp.CheckpointManager(
            Path(workdir).absolute() / "checkpoints", options=options
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss; the newest if none has been measured."""
        measured = {}
        for step in self._manager.all_steps():
            if metrics := self._manager.metrics(step):
                measured[step] = metrics["held_out_loss"]
        return min(measured, key=measured.get) if measured else self.latest_step()

    def steps(self) -> list[int]:
        """Every step there is a checkpoint of."""
        return sorted(self._manager.all_steps())

    def save(self, state: PyTree, step: int, held_out_loss: float | None) -> None:
        """Starts writing; returns as soon as the state may change."""
        metrics = None if held_out_loss is None else {"held_out_loss": held_out_loss}
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """The state at `step`, laid out as `abstract` says."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_parameters(
    config: Config, workdir: Path, mesh: Mesh, *, step: int | None = None, raw: bool = False
) -> tuple[PyTree, int]:
    """The parameters of a generator's run and the step they are of.

    Args:
      config: of the run in `workdir`.
      mesh: where the parameters will live.
      step: of the checkpoint; by default the best by held-out loss.
      raw: the parameters themselves, even where there is their average.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.best_step() if step is None else step
    if step is None or step not in checkpoints.steps():
        raise ValueError(
            f"step: {step} has no checkpoint in {workdir}; there are {checkpoints.steps()}"
        )
    state = checkpoints.restore(step, abstract_state(config, mesh))
    return (state.params if raw else state.best_params), step


def check_config(config: RunConfig, workdir: Path) -> None:
    """Refuses to go on with the run in `workdir`, if there is one, in another architecture.

    Raises:
      ValueError: naming every field of the architecture that differs from the stored one.
    """
    if not (Path(workdir) / "config.json").exists():
        return
    stored = load_config(workdir, type(config))
    there, switches = stored.architecture(), stored.switches()
    differing = [
        f"{name}: {there[name]!r} there, {value!r} now"
        for name, value in config.architecture().items()
        if name in there and there[name] != value
    ]
    differing += [
        f"{name}: {switches[name]!r} there, {value!r} now"
        for name, value in config.switches().items()
        if bool(switches[name]) != bool(value)
    ]
    if differing:
        raise ValueError(
            f"workdir: {workdir} holds a run of another architecture; give another "
            "directory or these fields their stored values: " + "; ".join(differing)
        )


def store_config(config: RunConfig, workdir: Path) -> None:
    """Writes config.json, making the folder if it is missing."""
    with whole_file(Path(workdir) / "config.json") as file:
        file.write_text(config_to_json(config))


def has_checkpoint(workdir: Path) -> bool:
    """Whether there is a complete checkpoint of the run in `workdir`, if there is a run."""
    if not (Path(workdir) / "checkpoints").is_dir():
        return False
    return Checkpoints(workdir, read_only=True).latest_step() is not None
