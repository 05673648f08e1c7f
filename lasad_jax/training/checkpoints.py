"""Checkpoints of the whole training state, written by Orbax in the background."""

import dataclasses
from pathlib import Path

import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from lasad_jax.config import Config, config_to_json, load_config
from lasad_jax.training.state import TrainState

# Fields of the model that may change between two runs of the same parameters.
_FREE_MODEL_FIELDS = ("dropout", "class_dropout", "remat", "dtype", "implementation")


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

    def save(self, state: TrainState, step: int, held_out_loss: float | None) -> None:
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


def store_config(config: Config, workdir: Path, *, write: bool = True) -> None:
    """Writes config.json; on going on, first refuses another architecture.

    Args:
      config: of this run.
      workdir: its folder, made if missing.
      write: False only checks, for all processes but one.

    Raises:
      ValueError: naming every field of the architecture that differs from the stored one.
    """
    path = Path(workdir) / "config.json"
    if path.exists():
        stored = load_config(workdir)
        differing = [
            f"model.{field.name}: {getattr(stored.model, field.name)!r} there, "
            f"{getattr(config.model, field.name)!r} now"
            for field in dataclasses.fields(config.model)
            if field.name not in _FREE_MODEL_FIELDS
            and getattr(stored.model, field.name) != getattr(config.model, field.name)
        ]
        if bool(stored.optimizer.ema_decay) != bool(config.optimizer.ema_decay):
            differing.append(
                f"optimizer.ema_decay: {stored.optimizer.ema_decay} there, "
                f"{config.optimizer.ema_decay} now"
            )
        if differing:
            raise ValueError(
                f"workdir: {workdir} holds a run of another architecture; give another "
                "directory or these fields their stored values: " + "; ".join(differing)
            )
    if not write:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config_to_json(config))
    temporary.replace(path)
