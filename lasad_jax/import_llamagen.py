"""Makes a run of one of LlamaGen's class-conditional checkpoints, the softmax baseline.

    python -m lasad_jax.import_llamagen --checkpoint=c2i_B_256.pt --tokenizer=vq_ds16_c2i.pt \\
        --grid=16,16 --out=runs/llamagen_B

The run is at step 0: lasad_jax.sample draws from it, lasad_jax.train goes on with it, and
others begin with its parameters by --config.init_from. The grid, which a checkpoint does not
tell, is that of its codes: 16,16 at 256 pixels, 24,24 at 384.
"""

from pathlib import Path

from absl import flags

from lasad_jax.command import rows_and_columns, run
from lasad_jax.config import Config, DataConfig
from lasad_jax.files import whole_folder
from lasad_jax.interop.llamagen import load_llamagen
from lasad_jax.interop.tokenizer_files import fingerprint, load_tokenizer
from lasad_jax.models.generator import count_parameters
from lasad_jax.training.new_run import write_run

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "LlamaGen's .pt, or a .safetensors.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "The file of the tokenizer of its codes.")
_GRID = flags.DEFINE_list("grid", None, "Rows and columns of codes, or one number for both.")
_HEADS = flags.DEFINE_integer(
    "num_heads", None, "Attention heads, for sizes that LlamaGen does not have.", 1
)
_OUT = flags.DEFINE_string("out", None, "Folder of the run, which must not exist.")


def import_llamagen(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """Writes the run that the flags ask for."""
    grid = rows_and_columns("grid", _GRID.value)
    if out.exists():
        raise FileExistsError(f"out: {out} exists already; remove it or give another folder")
    with whole_folder(out) as folder:
        codes, codes_params = load_tokenizer(tokenizer)
        model, params = load_llamagen(checkpoint, grid=grid, num_heads=_HEADS.value)
        if codes.codebook_size != model.vocab_size:
            raise ValueError(
                f"tokenizer: {tokenizer} has {codes.codebook_size} codes, but {checkpoint} "
                f"predicts {model.vocab_size}; give the tokenizer that it was trained with"
            )
        data = DataConfig(source="codes", tokenizer=fingerprint(codes, codes_params))
        write_run(folder, Config(model=model, data=data), params, (codes, codes_params))
    print(
        f"{out}: {model.num_layers} layers of width {model.width} with {model.num_heads} heads, "
        f"{count_parameters(model) / 1e6:.1f}M parameters, {model.num_classes} classes, "
        f"{model.vocab_size} codes"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "tokenizer", "grid", "out"])
    run(lambda: import_llamagen(Path(_CHECKPOINT.value), Path(_TOKENIZER.value), Path(_OUT.value)))
