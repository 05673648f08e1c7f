"""What samples are compared with: ADM's files, other files of images, splits of a source."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lasad_jax.evaluation.extract import Extraction, Images, size
from lasad_jax.evaluation.image_files import FileImages, npz_fingerprint
from lasad_jax.evaluation.measure import MOST_KEPT, Reference, see
from lasad_jax.evaluation.moments import Moments
from lasad_jax.evaluation.real_images import RealImages
from lasad_jax.files import whole_file
from lasad_jax.interop.adm_files import Statistics, read_statistics, write_statistics
from lasad_jax.interop.npz_members import new_member


def reference_of_file(
    path: Path,
    split: str,
    extraction: Extraction,
    *,
    shape: tuple[int, int, int],
    most_kept: int = MOST_KEPT,
    progress: bool = True,
) -> Reference:
    """The reference in an .npz: statistics of Inception's features, images, or both.

    As in ADM's files, statistics (mu, sigma, mu_s, sigma_s) are of more images than arr_0
    holds, which then only serve precision, recall and KID. A classifier's features are taken
    from arr_0 alone.

    Args:
      path: of the file.
      split: that it is of.
      extraction: the network.
      shape: of the samples, which images must have.
      most_kept: images whose features are kept, see `see`.
      progress: show a bar.

    Raises:
      FileNotFoundError, ValueError: a file that is missing, damaged, or does not fit.
    """
    fingerprint, names = npz_fingerprint("reference", path)
    kind, has_statistics = extraction.extractor.kind, {"mu", "sigma"} <= names
    if "arr_0" not in names and (kind != "inception" or not has_statistics):
        remedy = (
            "it holds statistics of Inception's features, which only --inception can be "
            "compared with; give a file of images, or the source of the data (--source)"
            if has_statistics
            else "give a file with mu and sigma, or with images arr_0"
        )
        raise ValueError(f"reference: {path} has no images (arr_0): {remedy}")
    statistics = None
    if kind == "inception" and has_statistics:
        statistics = read_statistics(path)
        dims = extraction.dims(shape)
        if len(statistics.pooled.mean) != dims.pooled:
            raise ValueError(
                f"reference: {path} has a mean of {len(statistics.pooled.mean)} features, but "
                f"Inception has {dims.pooled}; give statistics of Inception's pool3"
            )
    seen = None
    if "arr_0" in names:
        images = FileImages("reference", path)
        check_shapes(images.shape, shape)
        seen = see(extraction, images, most_kept=most_kept, name="reference" if progress else "")
    if statistics is None:
        pooled, spatial = seen.pooled.finish(), seen.spatial.finish()
    else:
        pooled, spatial = statistics.pooled, statistics.spatial
    kept = None if seen is None else seen.kept
    return Reference(str(path), fingerprint, split, pooled.count or 0, pooled, spatial, kept)


def reference_of_split(
    real: RealImages,
    split: str,
    extraction: Extraction,
    cache: Path,
    *,
    shape: tuple[int, int, int],
    most_kept: int = MOST_KEPT,
    progress: bool = True,
) -> Reference:
    """The images of a split of a source.

    Their features are taken once for each network and data set, and kept in the folder `cache`
    with statistics in ADM's names (mu, sigma, mu_s, sigma_s).

    Args:
      real, split: the images.
      extraction, shape, most_kept, progress: as in `reference_of_file`.
      cache: a folder, made if missing.

    Raises:
      FileNotFoundError, ValueError: images that are missing or do not fit.
    """
    check_shapes(real.shape(split), shape)
    extraction.check(real.shape(split))
    extractor, fingerprint = extraction.extractor, real.fingerprint(split)
    identity = [extractor.kind, extractor.fingerprint, fingerprint, split, most_kept]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = Path(cache) / f"reference_{extractor.kind}_{split}_{key}.npz"
    # The first process decides, lest another one sees a file that it has just written.
    if not multihost_utils.broadcast_one_to_all(np.int32(zipfile.is_zipfile(path))):
        images: Images = real.stream(split)
        seen = see(
            extraction, images, most_kept=most_kept, name=f"real ({split})" if progress else ""
        )
        if jax.process_index() == 0:
            _store(path, seen.pooled.finish(), seen.spatial.finish(), seen.kept)
        multihost_utils.sync_global_devices("reference")
    reference = _stored(path)
    return dataclasses.replace(reference, name=real.name, fingerprint=fingerprint, split=split)


def check_shapes(reference: tuple[int, int, int], samples: tuple[int, int, int]) -> None:
    """Refuses to compare images of different shapes.

    Raises:
      ValueError: naming both.
    """
    if tuple(reference) != tuple(samples):
        raise ValueError(
            f"samples are {size(samples)} but the real images {size(reference)}; compare with "
            "the images that the generator was trained on, or bring both to one size"
        )


def _store(path: Path, pooled: Moments, spatial: Moments, kept: np.ndarray) -> None:
    with whole_file(path) as file:
        write_statistics(file, Statistics(pooled, spatial))
        with zipfile.ZipFile(file, "a") as archive, new_member(archive, "features") as member:
            np.lib.format.write_array(member, kept)


def _stored(path: Path) -> Reference:
    pooled, spatial = read_statistics(path)
    with np.load(path) as file:
        kept = file["features"]
    return Reference(str(path), "", "", pooled.count, pooled, spatial, kept)
