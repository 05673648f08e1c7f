"""Writes a run's generator for PyTorch: python -m lasad_jax.export --workdir=RUN --out=DIR

DIR has the weights as safetensors, the model in plain PyTorch (modeling_lasadgen.py), the
tokenizer, and a README.md that says how to draw images with torch alone or through
transformers. --raw exports the parameters themselves, not their average; --dtype=bfloat16
halves the files; weights above --shard_gb are split over several.

Small models are verified before DIR appears: both frameworks give the same logits and draw the
same codes. --verify does so for any size, --noverify for none.
"""

from pathlib import Path

import jax
from absl import flags
from flax import linen as nn

from lasad_jax.command import run
from lasad_jax.config import load_config
from lasad_jax.data.tokens import TOKENIZER_FILE, load_class_names
from lasad_jax.files import whole_folder
from lasad_jax.interop.export_folder import Export, check_target, write_export
from lasad_jax.interop.generator_files import STORED_DTYPES
from lasad_jax.interop.model_card import describe, model_card
from lasad_jax.interop.tokenizer_files import load_tokenizer
from lasad_jax.interop.verification import verify
from lasad_jax.models import count_parameters
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import find_step, restore_parameters

# Seconds on a CPU; above, minutes, and both frameworks' copies of the weights in memory.
_SMALL = 200_000_000

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the best by held-out loss if unset.")
_RAW = flags.DEFINE_bool("raw", False, "Export the parameters themselves, not their average.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", STORED_DTYPES, "Of the stored matrices.")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "GB that a file of weights holds at most.", 0.0)
_FORCE = flags.DEFINE_bool("force", False, "Replace an earlier export.")
_VERIFY = flags.DEFINE_bool(
    "verify", None, f"Compare with PyTorch; by default up to {_SMALL // 10**6}M parameters."
)


def export(workdir: Path, out: Path) -> None:
    """Writes what the flags ask for."""
    config = load_config(workdir)
    check_target(out, force=_FORCE.value)
    if jax.process_count() > 1:
        raise ValueError("distributed: one process exports alone; run it without --distributed")
    step = find_step(workdir, _STEP.value)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        params = restore_parameters(config, workdir, mesh, step, raw=_RAW.value)
    tokenizer = None
    if config.data.source == "codes":
        tokenizer = load_tokenizer(workdir / TOKENIZER_FILE)
    exported = Export(
        config=config,
        params=jax.device_get(params),
        step=step,
        averaged=bool(config.optimizer.ema_decay) and not _RAW.value,
        class_names=load_class_names(workdir),
        tokenizer=tokenizer,
        dtype=_DTYPE.value,
    )
    verification, asked = None, _VERIFY.value
    asked = count_parameters(config.model) <= _SMALL if asked is None else asked
    with whole_folder(out, replace=_FORCE.value) as folder:
        write_export(folder, exported, shard_bytes=int(_SHARD_GB.value * 1e9))
        if asked:
            verification = verify(folder, config.model, exported.params, config.sampling)
        card = model_card(out.name, exported, verification)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"step {step} as {_DTYPE.value}: {out} (verified: {describe(verification)})")


if __name__ == "__main__":
    run(lambda: export(Path(_WORKDIR.value), Path(_OUT.value)))
