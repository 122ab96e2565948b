"""Class numbers from a NIfTI label map, placed on an image's voxels by coordinates; see `label_grid`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.readers.label_grid import exact_step, place_volume
from geomed_mae.readers.labels import IGNORE, LabelQuery, Labels
from geomed_mae.readers.nifti.file import Header, header, voxels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

MAX_CLASS = np.iinfo(np.int16).max


def read_labels(path: Path, onto: Image, query: LabelQuery) -> Labels:
    """Read stored values int16 (Z, Y, X), placed on the grid of `onto` by coordinates; IGNORE outside the label map.

    The two grids may be cropped, flipped or permuted against each other; nothing is resampled unless
    `query.resample` is "nearest". How many labels lie off the image is counted.

    Raises:
        ReadError: BAD_GEOMETRY (grids that do not coincide or overlap), BAND_MISMATCH (several volumes),
            DTYPE_UNSUPPORTED (not integers, or out of range), or a reason of `header`.
    """
    found = header(path)
    if not isinstance(onto.geometry, VolumeGeometry):
        raise ReadError(f"{shown(path)} is a volume of labels; the image is not a volume", Reason.BAD_GEOMETRY.name)
    if found.volumes != 1:
        raise ReadError(f"{shown(path)} holds {found.volumes} volumes; labels have one", Reason.BAND_MISMATCH.name)
    resampled = exact_step(found.affine, onto) is None
    if resampled and query.resample is None:
        # Told by the header alone: a folder of label maps is tried against every image.
        place_volume(np.zeros((0, 0, 0), np.int16), found.affine, onto, path=path, resample=None)
    classes = _classes(found, query.ignore)
    placed, outside = place_volume(classes, found.affine, onto, path=path, resample=query.resample)
    counts = (("label_voxels_outside_image", outside), ("label_maps_resampled", int(resampled)))
    return Labels(placed, counts=counts)


def _classes(found: Header, ignore: tuple[int, ...]) -> np.ndarray:
    """Return the whole label map as int16 (Z, Y, X); floats are fine where every value is a whole number."""
    values = voxels(found, 0, slice(0, found.shape[0]))
    if values.dtype.kind == "f" or (found.slope, found.inter) != (1.0, 0.0):
        values = values.astype(np.float64) * found.slope + found.inter
    known = ~np.isin(values, ignore) if ignore else np.ones(values.shape, dtype=bool)
    asked = values[known]
    with np.errstate(invalid="ignore"):
        whole = asked.dtype.kind in "iu" or bool((np.isfinite(asked) & (np.rint(asked) == asked)).all())
    if not whole or (asked.size and (asked.min() < IGNORE or asked.max() > MAX_CLASS)):
        raise ReadError(
            f"{shown(found.path)} holds values that are no class numbers from {IGNORE} (ignore) to {MAX_CLASS}; "
            "list the ones that mean 'not known' in labels.ignore",
            Reason.DTYPE_UNSUPPORTED.name,
        )
    classes = np.full(values.shape, IGNORE, np.int16)
    classes[known] = asked.astype(np.int16)
    return classes
