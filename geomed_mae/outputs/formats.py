"""Which format holds which images, and what the writer of a format is told beyond the map itself."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.heads.task_model import TaskModel
from geomed_mae.writers import AUTO, writer

DICOM_SEG = "dicom-seg"
GRIDS = {"cog": ("raster",), "nifti": ("volume", "plane"), DICOM_SEG: ("volume", "plane")}
"""Geometries that a format can represent."""


def form_of(wanted: str, row: Row) -> str:
    """Return the name of the writer for an image; "auto" is COG for rasters and NIfTI for everything else.

    Raises:
        ConfigError: the format cannot hold the image's geometry.
    """
    form = AUTO[row.geometry] if wanted == "auto" else wanted
    if row.geometry not in GRIDS.get(form, (row.geometry,)):
        raise ConfigError(f"--format {form} cannot hold a {row.geometry}; use --format auto")
    return form


def check_formats(forms: Sequence[str], index: Index, rows: Sequence[Row], *, probabilities: bool) -> None:
    """Make sure that the writers can hold what is asked of them, before anything is computed.

    Raises:
        ConfigError: there is no such writer, it cannot hold probabilities, or a DICOM segmentation is asked for of an
            image that is not DICOM.
    """
    for form in sorted(set(forms)):
        made = writer(form)
        if probabilities and not hasattr(made, "stream_chances"):
            raise ConfigError(f"--probabilities cannot be written as {form}; leave it out, or choose another --format")
    _check_dicom([row for form, row in zip(forms, rows, strict=True) if form == DICOM_SEG], index)


def _check_dicom(rows: Sequence[Row], index: Index) -> None:
    if rows:
        writer(DICOM_SEG).require()
    strange = [row for row in rows if index.reader(row.key) != "dicom"]
    if strange:
        one = strange[0]
        raise ConfigError(
            f"--format {DICOM_SEG} refers to DICOM slices, and {len(strange)} of {len(rows)} images are no DICOM, for "
            f"example a {one.geometry} of modality {one.modality}, read as {index.reader(one.key)}; use --format nifti"
        )


def writer_options(form: str, model: TaskModel, index: Index, row: Row, digest: str) -> dict[str, Any]:
    """Return what the writer's `stream` and `stream_chances` take beyond path, shape, geometry and classes.

    Args:
        form: name of the writer.
        model: whose answer is written.
        index: archive of the image.
        row: the image.
        digest: SHA-256 of the model's weights and settings.

    Raises:
        ReadError: the files of a DICOM image are gone, or are others than those that were indexed.
    """
    if form != DICOM_SEG:
        return {}
    return {"origin": index.dicom_origin(row.key), "codes": model.spec.head.codes, "model": digest}


def chances_name(name: str, made: ModuleType) -> str:
    """Return the name of the file of probabilities beside the map that has the stem `name`."""
    return f"{name}.probabilities{made.SUFFIX}"
