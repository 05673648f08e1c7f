"""Draws Han characters in 13 typefaces, as MNIST-format files: data of a generator.

    python -m lasad_jax.render_characters --out=data/han

The class is the typeface; one character in twenty is held out, in all typefaces. With the
defaults, 238,818 + 12,497 images in a minute. The fonts are those of Debian's packages, which
the command names if they are missing.
"""

from pathlib import Path

import jax
from absl import flags

from lasad_jax.command import run
from lasad_jax.data.characters import HAN_FACES, draw_faces, find_faces, split_by_character
from lasad_jax.data.sources.idx import write_idx
from lasad_jax.files import whole_folder

_OUT = flags.DEFINE_string("out", None, "Folder to write, which must not exist.", required=True)
_SIZE = flags.DEFINE_integer("size", 24, "Rows and columns of an image.", 8)
_LEVELS = flags.DEFINE_integer("levels", 8, "Grey levels of a pixel.", 2, 256)
_FONTS = flags.DEFINE_string("fonts", "/usr/share/fonts", "Folder with the fonts, however deep.")


def render(out: Path) -> None:
    """Writes the images that the flags ask for."""
    if out.exists():
        raise FileExistsError(f"out: {out} exists already; remove it or give another folder")
    if jax.process_count() > 1:
        raise ValueError("distributed: one process draws alone; run it without --distributed")
    paths = find_faces(Path(_FONTS.value))
    fonts = [(path, face.index) for path, face in zip(paths, HAN_FACES, strict=True)]
    splits = split_by_character(
        draw_faces(fonts, size=_SIZE.value, levels=_LEVELS.value, progress=True)
    )
    with whole_folder(out) as folder:
        write_idx(
            folder,
            {split: (part.images, part.labels) for split, part in splits.items()},
            class_names=[face.name for face in HAN_FACES],
        )
    counts = " + ".join(f"{len(part.images):,} {split}" for split, part in splits.items())
    print(f"{out}: {counts} images of {len(fonts)} typefaces")


if __name__ == "__main__":
    run(lambda: render(Path(_OUT.value)))
