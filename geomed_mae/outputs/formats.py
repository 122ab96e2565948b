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
AUTOMATIC = "auto"


def known_format(wanted: str) -> None:
    """Make sure that a format is "auto" or the name of a writer.

    Raises:
        ConfigError: it is none; the message names the nearest.
    """
    if wanted != AUTOMATIC:
        writer(wanted)


def forms_of(wanted: str, rows: Sequence[Row]) -> list[str]:
    """Return the name of the writer for each image; "auto" is COG for rasters and NIfTI for everything else.

    Raises:
        ConfigError: there is no such writer, or it cannot hold an image's geometry.
    """
    forms = {kind: AUTO[kind] if wanted == AUTOMATIC else wanted for kind in {row.geometry for row in rows}}
    for kind, form in sorted(forms.items()):
        if kind not in writer(form).GEOMETRIES:
            raise ConfigError(f"--format {form} cannot hold a {kind}; use --format {AUTOMATIC}")
    return [forms[row.geometry] for row in rows]


def check_formats(
    forms: Sequence[str], index: Index, rows: Sequence[Row], classes: tuple[str, ...], *, probabilities: bool
) -> None:
    """Make sure that the writers can hold what is asked of them, before anything is computed.

    Raises:
        ConfigError: it cannot hold probabilities, or not so many, or a DICOM segmentation is asked for of an image that
            is not DICOM.
    """
    for form in sorted(set(forms)):
        made = writer(form)
        if probabilities and not hasattr(made, "stream_chances"):
            raise ConfigError(f"--probabilities cannot be written as {form}; leave it out, or choose another --format")
    dicom = [row for form, row in zip(forms, rows, strict=True) if form == DICOM_SEG]
    _check_dicom(dicom, index)
    for row in dicom if probabilities else ():
        writer(DICOM_SEG).check_chances(row.shape, classes)


def _check_dicom(rows: Sequence[Row], index: Index) -> None:
    if rows:
        writer(DICOM_SEG).require()
    strange = [row for row in rows if index.reader(row.key) != "dicom"]
    if strange:
        one = strange[0]
        raise ConfigError(
            f"--format {DICOM_SEG} refers to DICOM slices, and {len(strange)} of {len(rows)} images are no DICOM, for "
            f"example '{index.paths(one.key)[0]}', read as {index.reader(one.key)}; give the DICOM images alone, or "
            "use --format nifti"
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
