"""Checkpoints of the whole training state, written by Orbax in the background."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from lasad_jax.config import Config, RunConfig, config_to_json, load_config
from lasad_jax.files import whole_file
from lasad_jax.training.guard import new_guard
from lasad_jax.training.integrity import damage, store_sizes
from lasad_jax.training.state import abstract_state

_UNFINISHED_FILE = "unfinished.json"


class Checkpoints:
    """The checkpoints/ folder of a run: the newest few and the best by held-out loss.

    A checkpoint is there whole or not at all. One that was damaged later is passed over.
    """

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
        self._folder = Path(workdir).absolute() / "checkpoints"
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            # The policy decides; without this too, Orbax does not write metrics to disk.
            best_fn=held_out_loss,
            best_mode="min",
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            create=False,
            save_interval_steps=0 if read_only else 1,
            # Named, processes wait for each other by the hosts' network alone: with JAX's own
            # barrier, a collective, nothing could be saved while the devices wait for a process.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _list_files(self) -> None:
        """Called once all files of a checkpoint are written, before it has its name."""
        if jax.process_index() == 0:
            for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
                store_sizes(folder)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss; the newest if none has been measured."""
        measured = {}
        for step in self.steps():
            if metrics := self._manager.metrics(step):
                measured[step] = metrics["held_out_loss"]
        return min(measured, key=measured.get) if measured else self.latest_step()

    def steps(self) -> list[int]:
        """Every step there is a checkpoint of."""
        steps = self._manager.all_steps()
        return sorted(step for step in steps if not damage(self._folder / str(step)))

    def save(self, state: PyTree, step: int, held_out_loss: float | None) -> None:
        """Starts writing, unless `step` is there; returns as soon as the state may change.

        Raises:
          OSError: the checkpoint before could not be written. Those that were there still are.
        """
        metrics = None if held_out_loss is None else {"held_out_loss": held_out_loss}
        with self._writing():
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                self._manager.save(
                    step, args=ocp.args.StandardSave(state), metrics=metrics, force=True
                )

    def wait(self) -> None:
        """Waits for what is being written; raises as `save` does."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Orbax and TensorStore have no type of their own for a disk that does not take it.
            raise OSError(
                f"workdir: a checkpoint cannot be written to {self._folder} "
                f"({_first_line(error)}); those already there are whole, and the same command goes "
                "on from the newest once there is room"
            ) from error

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """The state at `step`, laid out as `abstract` says.

        A state from before there was a guard against spikes comes back with a new one.

        Raises:
          ValueError: naming the file that is damaged, or the arrays that differ from `abstract`.
        """
        folder = self._folder / str(step)
        if reason := damage(folder):
            raise ValueError(f"{folder}: damaged: {reason}; take another step, of {self.steps()}")
        try:
            stored = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "default").tree)
            wanted = _shapes(abstract)
            older = not any(name.startswith("guard/") for name in stored)
            if older:
                wanted = {name: x for name, x in wanted.items() if not name.startswith("guard/")}
            if not (differing := _differences(stored, wanted)):
                asked = abstract.replace(guard=None) if older else abstract
                state = self._manager.restore(step, args=ocp.args.StandardRestore(asked))
                if not older:
                    return state
                shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.guard)
                return state.replace(guard=jax.jit(new_guard, out_shardings=shardings)())
        except Exception as error:
            raise ValueError(
                f"{folder}: cannot be read ({_first_line(error)}); move it out of checkpoints/ to "
                f"go on from another step, of {self.steps()}"
            ) from error
        raise ValueError(f"{folder}: a state of another architecture: " + "; ".join(differing))

    def measured(self, step: int, held_out_loss: float) -> None:
        """Adds the held-out loss to a checkpoint that was saved before it was known."""
        if jax.process_index() == 0:
            with whole_file(self._folder / str(step) / "metrics" / "metrics") as file:
                file.write_text(json.dumps({"held_out_loss": held_out_loss}))
            store_sizes(self._folder / str(step))
        self._manager.reload()

    def close(self) -> None:
        """Waits for what is being written; raises as `save` does."""
        self.wait()
        self._manager.close()


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _differences(stored: dict[str, tuple], wanted: dict[str, tuple], most: int = 5) -> list[str]:
    """In words, the first few."""
    said = [
        f"{name}: {stored.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} now"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    return said[:most] + ([f"and {len(said) - most} more"] if len(said) > most else [])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


def find_step(workdir: Path, step: int | None = None) -> int:
    """The checkpoint of a run that is meant: `step`, or the best by held-out loss.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.best_step() if step is None else step
    if step is None or step not in checkpoints.steps():
        raise ValueError(
            f"step: {step} has no checkpoint in {workdir}; there are {checkpoints.steps()}"
        )
    return step


def restore_parameters(
    config: Config, workdir: Path, mesh: Mesh, step: int, *, raw: bool = False
) -> PyTree:
    """The parameters of a generator's run.

    Args:
      config: of the run in `workdir`.
      mesh: where the parameters will live.
      step: from `find_step`.
      raw: the parameters themselves, even where there is their average.
    """
    state = Checkpoints(workdir, read_only=True).restore(step, abstract_state(config, mesh))
    return state.params if raw else state.best_params


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


def mark_unfinished(workdir: Path, step: int | None) -> None:
    """Notes that a run ended within the evaluation or drawing at `step`; None for no longer."""
    path = Path(workdir) / _UNFINISHED_FILE
    if step is None:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as file:
        file.write_text(json.dumps({"step": step}))


def unfinished_step(workdir: Path) -> int | None:
    """The step whose evaluation and drawing are to be made up for, if there is one."""
    path = Path(workdir) / _UNFINISHED_FILE
    return json.loads(path.read_text())["step"] if path.exists() else None
