"""A run made of parameters that come from elsewhere."""

import contextlib
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from lasad_jax.config import Config, MeshConfig
from lasad_jax.data.tokens import TOKENIZER_FILE, store_class_names
from lasad_jax.interop.tokenizer_files import save_tokenizer
from lasad_jax.models.tokenizer_config import TokenizerConfig
from lasad_jax.training.checkpoints import Checkpoints, store_config
from lasad_jax.training.sharding import make_mesh
from lasad_jax.training.state import init_state


def write_run(
    workdir: Path,
    config: Config,
    params: PyTree,
    tokenizer: tuple[TokenizerConfig, PyTree] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Fills a run directory: a state at step 0 that has these parameters, as their average too.

    Args:
      workdir: the folder, see `lasad_jax.files.whole_folder`.
      config: of the run.
      params: of its `LASADGen`, all of them.
      tokenizer: of its codes, for a run on codes.
      class_names: one for each class, if known.
    """
    store_config(config, workdir)
    if tokenizer is not None:
        save_tokenizer(workdir / TOKENIZER_FILE, *tokenizer)
    if class_names is not None:
        store_class_names(class_names, workdir)
    # Split over what devices there are: large models may not fit on one.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        state = init_state(config, mesh, flatten_dict(params, sep="/"))
        checkpoints.save(state, 0, held_out_loss=None)
