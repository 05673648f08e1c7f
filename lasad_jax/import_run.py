"""Makes a run of a folder that lasad_jax.export wrote.

    python -m lasad_jax.import_run --folder=DIR --out=runs/again

The run is at step 0 and has the folder's parameters, number by number. lasad_jax.sample draws
from it, lasad_jax.train goes on with it, and others begin with its parameters by
--config.init_from.
"""

from pathlib import Path

from absl import flags

from lasad_jax.command import run
from lasad_jax.files import whole_folder
from lasad_jax.interop.export_folder import read_export
from lasad_jax.models.generator import count_parameters
from lasad_jax.training.new_run import write_run

_FOLDER = flags.DEFINE_string("folder", None, "What lasad_jax.export wrote.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the run, which must not exist.", required=True)


def import_run(exported: Path, out: Path) -> None:
    """Writes the run that the flags ask for."""
    if out.exists():
        raise FileExistsError(f"out: {out} exists already; remove it or give another folder")
    found = read_export(exported)
    with whole_folder(out) as folder:
        write_run(folder, *found)
    model = found.config.model
    print(
        f"{out}: {model.num_layers} layers of width {model.width}, "
        f"{count_parameters(model) / 1e6:.1f}M parameters, {model.num_classes} classes, "
        f"{model.vocab_size} codes"
    )


if __name__ == "__main__":
    run(lambda: import_run(Path(_FOLDER.value), Path(_OUT.value)))
