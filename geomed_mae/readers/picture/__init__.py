"""Pictures: PNG and JPEG, as radiographs, chips and photographs often come. Values are the stored ones.

A picture has no position. For a plane modality (radiographs ...) its geometry is a plane without spacing: what a
picture says of dots an inch is about printing. For a raster modality it is a raster without coordinate system; a world
file beside it is not read. EXIF orientation is applied: the first row of the array is the one to be seen on top.

What a picture shows is stated by the modality that the user names. With "auto", 8-bit colours are `rgb`, and
everything else is `unnamed-plane`. A modality of one channel also takes colours whose three channels are equal in every
valid pixel, as many radiographs are saved; colours that differ are refused, not averaged. No grey becomes three
channels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Geometry, Image, PlaneGeometry, RasterGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.picture import jpeg, png
from geomed_mae.readers.picture.structure import UPRIGHT, Structure, upright
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.source import Refusal, Source, Survey, whole_window

__all__ = ["Header", "group", "header", "read", "sniff"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif")
EXTRA, PACKAGE = "geo", "PIL"
NOT_THIS_FORMAT = Reason.MALFORMED

FORMAT = "picture"
"""Name of this reader in a modality's `formats`."""
SIDE_CARS = (".aux.xml",)
WORLD_FILES = (".pgw", ".pngw", ".jgw", ".jpgw", ".jpegw", ".wld")
PREVIEW_WORDS = ("thumb", "preview", "quicklook", "browse")
"""Parts of the names of pictures that products carry of their images."""
IMAGE_SUFFIXES = (".tif", ".tiff", ".TIF", ".TIFF", ".jp2", ".dcm", ".nii", ".nii.gz")
"""A picture beside a file of its own name and one of these endings is a rendering or a label of that file."""


FOREIGN_SUFFIXES = (".tif", ".tiff", ".gtiff", ".jp2", ".dcm", ".dicom", ".nii", ".nii.gz", ".hdr", ".img")
"""Endings that promise another format: a picture under such a name is no picture but a file that breaks a promise."""


@dataclass(frozen=True, slots=True)
class Header:
    """A picture's path, its structure and flags, without its pixels."""

    path: Path
    structure: Structure
    flags: tuple[str, ...]


def sniff(path: Path, head: bytes) -> bool:
    """Whether the first bytes are those of a PNG or of a JPEG, and the name promises no other format."""
    return head.startswith((png.MAGIC, jpeg.MAGIC)) and not path.name.lower().endswith(FOREIGN_SUFFIXES)


def _codec(path: Path) -> ModuleType:
    with path.open("rb") as file:
        return png if file.read(len(png.MAGIC)) == png.MAGIC else jpeg


def header(path: Path) -> Header:
    """Read what a picture says of itself, no pixels.

    Raises:
        ReadError: NON_IMAGE (a preview), or a reason of `picture.png.structure` or `picture.jpeg.structure`.
    """
    name = path.name.lower()
    beside = next((end for end in IMAGE_SUFFIXES if _exists(path.parent / (path.stem + end))), None)
    if beside or any(word in name for word in PREVIEW_WORDS):
        why = f"a {beside} of the same name lies beside it" if beside else "its name says so"
        raise ReadError(f"{shown(path)} is a rendering of another image: {why}", Reason.NON_IMAGE.name)
    found = _codec(path).structure(path)
    flags = []
    sides = [path.with_name(path.name + end) for end in SIDE_CARS] + [path.with_suffix(end) for end in WORLD_FILES]
    if any(map(_exists, sides)):
        flags.append("SIDE_CAR_IGNORED")
    if found.several:
        flags.append("FIRST_PAGE_ONLY")
    if found.orientation != UPRIGHT:
        flags.append("TURNED_UPRIGHT")
    return Header(path, found, tuple(flags))


def _exists(path: Path) -> bool:
    return os.path.lexists(path)  # unlike Path.exists, no error for a name too long


def group(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Make one Source of each picture, of the modality that fits its channels and depth."""
    sources, refusals = [], []
    for found in headers:
        outcome = _source(found, modalities)
        (sources if isinstance(outcome, Source) else refusals).append(outcome)
    return Survey(sources, refusals)


def _source(found: Header, modalities: Sequence[Modality]) -> Source | Refusal:
    candidates = [m for m in modalities if FORMAT in m.formats and m.geometry in ("raster", "plane")]
    if not candidates:
        names = ", ".join(m.name for m in modalities)
        # Not bad: products of every other modality carry pictures of themselves.
        return Refusal(found.path, Reason.NON_IMAGE, f"a picture; none of the chosen modalities ({names}) comes as one")
    outcome = _choose(found.structure, candidates)
    if isinstance(outcome, str):
        return Refusal(found.path, Reason.MODALITY_MISMATCH, outcome)
    modality, channels, flags = outcome
    return Source(
        reader=FORMAT,
        files=(found.path,),
        selector={"scale": modality.scale, "offset": modality.offset, "nodata": modality.nodata},
        modality=modality.name,
        channels=channels,
        shape=found.structure.shape,
        dtype=found.structure.dtype,
        geometry=_geometry(modality),
        flags=(*found.flags, *flags),
        codec=found.structure.codec,
    )


def _geometry(modality: Modality) -> Geometry:
    if modality.geometry == "plane":
        return PlaneGeometry()
    return RasterGeometry(None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)


def _choose(
    found: Structure, candidates: Sequence[Modality]
) -> tuple[Modality, tuple[Channel, ...], tuple[str, ...]] | str:
    """Return (modality, its channels, flags), or why there is none."""
    unnamed = next((m for m in candidates if not m.channels), None)
    deep_enough = [m for m in candidates if m.channels and (found.dtype == "uint8" or not _eight_bit(m))]
    fits = [m for m in deep_enough if len(m.channels) == found.bands]
    if unnamed is not None:
        # Several modalities are one grey channel: nothing in a picture tells a radiograph from an ultrasound.
        if len(fits) == 1 and found.bands > 1:
            return fits[0], fits[0].channels, ()
        channels = tuple(Channel(name=f"band{n}", unit=unnamed.unit) for n in range(1, found.bands + 1))
        return unnamed, channels, ("MODALITY_UNNAMED",)
    if not fits and found.bands == 3:
        fits = [m for m in deep_enough if len(m.channels) == 1]
    if len(fits) == 1:
        return fits[0], fits[0].channels, ()
    names = ", ".join(f"{m.name} ({len(m.channels)})" for m in candidates)
    what = f"{found.bands} channel{'s' * (found.bands > 1)} of {found.dtype}"
    if fits:
        return f"{what} could be any of {', '.join(m.name for m in fits)}; name one of them"
    return f"{what} fit none of the chosen modalities: {names}"


def _eight_bit(modality: Modality) -> bool:
    """Whether the modality's digital numbers end at 255, so that 16-bit samples cannot be in its unit."""
    return modality.unit == "DN" and modality.value_range is not None and modality.value_range[1] <= 255


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read the picture, or a window (rows, columns) of it, as float32; the whole of it is decoded either way.

    A pixel is invalid where it is fully transparent or has the modality's nodata value in every channel; it is 0 there.

    Raises:
        ReadError: TRUNCATED, DECODE_FAILED, MALFORMED (also: changed since its header was read), BAND_MISMATCH (colours
            for a modality of one channel), or a reason of `header`.
    """
    path, selector = source.files[0], source.selector
    rows, columns = whole_window(window, source.shape)
    try:
        structure, samples, opaque = _codec(path).pixels(path)
    except OSError as error:
        raise ReadError(f"{shown(path)} cannot be read: {error.strerror}", Reason.VANISHED.name) from None
    if structure.shape != tuple(source.shape) or structure.dtype != source.dtype:
        raise ReadError(f"{shown(path)} has changed since its header was read", Reason.MALFORMED.name)
    if len(samples) != len(source.channels):
        samples = _one_channel(samples, opaque, path)
    stored = upright(samples, structure.orientation)[:, rows, columns]
    valid = np.ones((1, *stored.shape[1:]), np.bool_)
    if opaque is not None:
        valid &= upright(opaque, structure.orientation)[rows, columns]
    if selector["nodata"] is not None:
        valid &= (stored != selector["nodata"]).any(axis=0)
    scale, offset = selector["scale"], selector["offset"]
    exact = stored if (scale, offset) == (1.0, 0.0) else stored.astype(np.float64) * scale + offset
    values = np.where(valid, exact, 0).astype(np.float32)
    geometry = source.geometry.shifted(rows.start, columns.start)
    return Image(values, valid, source.channels, geometry, source.modality)


def _one_channel(samples: np.ndarray, opaque: np.ndarray | None, path: Path) -> np.ndarray:
    """Return the one channel (1, rows, columns) that colours consist of, where they are equal in every valid pixel."""
    differs = (samples != samples[:1]).any(axis=0)
    if opaque is not None:
        differs &= opaque
    if differs.any():
        raise ReadError(
            f"{shown(path)} has colours in {np.count_nonzero(differs)} pixels, for a modality of one channel; choose a "
            "modality with three channels, or save it as grey",
            Reason.BAND_MISMATCH.name,
        )
    return samples[:1]
