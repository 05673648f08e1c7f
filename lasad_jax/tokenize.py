"""Turns images into stored codes, once, for training a generator on them.

    python -m lasad_jax.tokenize --tokenizer=runs/clipart_tokenizer --out=data/clipart
    python -m lasad_jax.tokenize --tokenizer=vq_ds16_c2i.pt --source=tfds --name=imagenet2012 \\
        --image_size=256 --crops=ten --ratios=1.1,1.05 --out=data/imagenet256_codes

The tokenizer is a run of lasad_jax.train_tokenizer, whose images are the default source, or
a file: LlamaGen's .pt, or a .safetensors. --crops says how many views of each training image
are stored: its centre, that and its mirror image, or ten crops for each of --ratios; held-out
images have one. Running the same command again, also on another number of processes, goes on
where it was stopped.
"""

import dataclasses
import functools
from pathlib import Path

import jax
from absl import flags

from lasad_jax.command import run
from lasad_jax.data.codes import Job, store_job, write_codes
from lasad_jax.data.crops import CROPS, view_names, views
from lasad_jax.data.flags import data_fields
from lasad_jax.data.images import common_size
from lasad_jax.data.sources import SPLITS, open_source
from lasad_jax.data.tokens import TOKENIZER_FILE
from lasad_jax.interop.tokenizer_files import fingerprint, save_tokenizer
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.training.tokenizer_task import load_any_tokenizer

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer's run directory or file.")
_OUT = flags.DEFINE_string("out", None, "Folder of the codes; made if missing.")
_CROPS = flags.DEFINE_enum("crops", "flip", CROPS, "Views stored of each training image.")
_RATIOS = flags.DEFINE_list("ratios", ["1.1"], "Sizes, relative, that ten crops are cut from.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Views encoded at a time by a process.", 1)
_SHARD = flags.DEFINE_integer("images_per_shard", 8192, "Images per file.", 1)
_UNREADABLE = flags.DEFINE_float(
    "max_unreadable", 0.001, "Share of images that may be unreadable; they are listed.", 0, 1
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ("float32", "bfloat16"),
    "The tokenizer's precision; bfloat16 is several times faster and changes some codes.",
)


def tokenize(tokenizer: Path, out: Path) -> None:
    """Writes the codes that the flags ask for."""
    config, params, data = load_any_tokenizer(tokenizer)
    data = dataclasses.replace(data, **data_fields())
    sources = {split: open_source(data, split, channels=config.channels) for split in SPLITS}
    size = common_size(data, sources["train"])
    crops = {"train": (_CROPS.value, _ratios()), "test": ("center", ())}
    job = Job.of_sources(
        sources,
        source=dataclasses.asdict(data) | {"image_size": size},
        tokenizer=fingerprint(config, params),
        grid=config.grid(size),
        vocab_size=config.codebook_size,
        views={split: view_names(*crop) for split, crop in crops.items()},
        images_per_shard=_SHARD.value,
        dtype=_DTYPE.value,
    )
    out.mkdir(parents=True, exist_ok=True)
    store_job(out, job, jax.process_index())
    if jax.process_index() == 0:
        save_tokenizer(out / TOKENIZER_FILE, config, params)
    computing = dataclasses.replace(config, dtype=_DTYPE.value)
    codec = TokenizerCodec(computing, params, batch_size=_BATCH.value)
    fit = {"size": size, "fit": data.fit, "background": data.background}
    manifest = write_codes(
        out,
        job,
        sources,
        {
            split: functools.partial(views, crops=crop, ratios=ratios, **fit)
            for split, (crop, ratios) in crops.items()
        },
        codec.encode_batch,
        batch_size=codec.batch_size,
        max_unreadable=_UNREADABLE.value,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for split, content in manifest.splits.items() if manifest else ():
        print(
            f"{split}: {content.images} images x {content.augmentations} views, "
            f"{len(content.unreadable)} unreadable"
        )


def _ratios() -> tuple[float, ...]:
    if _CROPS.value != "ten":
        return ()
    try:
        return tuple(float(word) for word in _RATIOS.value)
    except ValueError as error:
        raise ValueError(f"ratios: {_RATIOS.value} must be numbers such as 1.1,1.05") from error


if __name__ == "__main__":
    flags.mark_flags_as_required(["tokenizer", "out"])
    run(lambda: tokenize(Path(_TOKENIZER.value), Path(_OUT.value)))
