"""Descriptions of files, folders and indexes as plain values: what `inspect` shows.

Headers are read first; pixels only of the images that are described in full, a large raster part by part. What cannot
be used is listed with its reason and the way out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.examine import parts
from geomed_mae.archives.index import Index
from geomed_mae.archives.split_file import load_split
from geomed_mae.archives.statistics import Running
from geomed_mae.archives.views import Sketch, View, axis_letters, shown_as
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.image import Geometry, RasterGeometry, VolumeGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import nothing_usable, read_guarded, reader, survey
from geomed_mae.readers.reasons import Reason, status
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Refusal, Source

HISTOGRAM_BINS = 32
FEW = 4
"""So many images are described in full without being asked for."""

WAYS_OUT = {
    Reason.MODALITY_MISMATCH: "say what it is with --modality NAME or a YAML file of your own",
    Reason.BAND_MISMATCH: "name its bands, or write a modality file for them and pass it with --modality",
    Reason.UNIT_CONFLICT: "write a modality file with this unit and pass it with --modality",
    Reason.BASELINE_UNKNOWN: "keep the scene's metadata file beside its bands",
    Reason.SCENE_INCOMPLETE: "complete the scene, or move its files out of the archive",
    Reason.SLICE_GAP: "fetch the missing slices from the archive that it came from",
    Reason.LABEL: "pass it as --labels to finetune, evaluate or probe",
    Reason.PERMISSION: "ask for the right to read it",
    Reason.TRUNCATED: "copy it again from where it came from",
    Reason.DECODE_FAILED: "copy it again from where it came from",
    Reason.LENGTH_MISMATCH: "copy it again from where it came from",
    Reason.NO_PIXEL_DATA: "copy it again from where it came from",
    Reason.BURNED_IN: "have the pixels cleaned first (DICOM PS3.15, Clean Pixel Data Option)",
}
"""What to do about a reason; the others say it themselves, or there is nothing to be done."""


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """What was found.

    Attributes:
        images: one dictionary of plain values an image, brief for those whose pixels were not asked for.
        refused: reason code -> number of files that are in no image.
        views: of the images described in full, by their number from 1.
    """

    images: Sequence[dict[str, Any]]
    refused: dict[str, int]
    views: dict[int, list[View]]


def look_into(path: str | Path, modality: str = "auto", *, full: bool = False, only: int | None = None) -> Inspection:
    """Describe a file or a folder of raw images.

    Args:
        path: file or folder.
        modality: name or YAML file of a modality, or "auto".
        full: read the pixels of all images, not only of up to four.
        only: read those of this image, counted from 1.

    Raises:
        ReadError: a single file cannot be read; the message says why and what to do.
        TooManyBadInputsError: a folder holds nothing usable.
        ConfigError: no such path or modality, or no image of that number.
    """
    path = Path(path)
    found = survey(list_files(path), resolve_modalities(modality), root=path if path.is_dir() else None)
    if not found.sources:
        raise _refusal(path, found.refusals)
    sources = sorted(found.sources, key=lambda source: (source.files[0], str(source.selector)))
    if only is not None and not 1 <= only <= len(sources):
        raise ConfigError(f"there is no image {only}: '{path}' holds {len(sources)}, counted from 1")
    asked = {only} if only is not None else set(range(1, len(sources) + 1)) if full or len(sources) <= FEW else set()
    images, views = [], {}
    refused = Counter(refusal.reason.name for refusal in found.refusals)
    for number, source in enumerate(sources, 1):
        entry = {"number": number, **_brief(source)}
        if number in asked:
            try:
                detail, views[number] = _pixels(source)
                entry |= detail
            except ReadError as error:
                if len(sources) == 1:
                    raise _refusal(path, [Refusal(source.files[0], Reason[error.reason], str(error))]) from error
                entry["refused"] = {"reason": error.reason, "detail": str(error)}
        images.append(entry)
    return Inspection(images, dict(refused.most_common()), views)


def _refusal(path: Path, refusals: Sequence[Refusal]) -> Exception:
    """Return the error of a path that holds no image, with the way out."""
    error = nothing_usable(path, refusals)
    ways = list(dict.fromkeys(WAYS_OUT[refusal.reason] for refusal in refusals if refusal.reason in WAYS_OUT))
    if not ways:
        return error
    text = f"{error}; {'; or '.join(ways[:2])}"
    return ReadError(text, error.reason) if isinstance(error, ReadError) else type(error)(text)


def _brief(source: Source) -> dict[str, Any]:
    return {
        "modality": Path(source.modality).stem,
        "shape": [len(source.channels), *source.shape],
        "dtype": source.dtype,
        "files": len(source.files),
        "flags": list(source.flags),
        "geometry": _geometry(source.geometry, source),
        "channels": [asdict(channel) for channel in source.channels],
    }


def _geometry(geometry: Geometry, source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {"spacing": geometry.spacing}
    if isinstance(geometry, RasterGeometry):
        ring = reader(source.reader).footprint(geometry, source.shape) if geometry.crs else None
        centre = None if ring is None else _centre(ring)
        transform = list(geometry.transform)
        return found | {
            "kind": "raster",
            "crs": geometry.crs,
            "transform": transform,
            "footprint": ring,
            "centre": centre,
        }
    if isinstance(geometry, VolumeGeometry):
        affine = geometry.affine
        return found | {
            "kind": "volume",
            "affine_lps": affine.tolist(),
            "axes": dict(zip(("slices", "rows", "columns"), axis_letters(affine), strict=True)),
            "tilt_degrees": _tilt(affine),
        }
    return found | {"kind": "plane"}


def _centre(ring: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (longitude, latitude) of the middle of the corners, longitude between -180 and 180."""
    lon, lat = (sum(values) / len(ring) for values in zip(*ring, strict=True))
    return (lon + 180.0) % 360.0 - 180.0, lat


def _tilt(affine: np.ndarray) -> float:
    """Return the angle in degrees between the step from slice to slice and the slices' normal: the gantry tilt."""
    normal = np.cross(affine[:3, 1], affine[:3, 2])
    step = affine[:3, 0]
    # From sine and cosine: near 0 the arc cosine alone is wrong by 1e-6 degrees.
    angle = math.atan2(np.linalg.norm(np.cross(normal, step)), abs(float(normal @ step)))
    return round(math.degrees(angle), 6)


def _pixels(source: Source) -> tuple[dict[str, Any], list[View]]:
    """Read an image part by part; return what its pixels say, and its views."""
    running = Running(len(source.channels), math.prod(source.shape))
    sketch: Sketch | None = None
    for window in parts(source):
        image = read_guarded(source, window)
        sketch = sketch or Sketch(image.channels, source.shape, image.geometry)
        sketch.add(image)
        running.add(image.array, image.valid)
    assert sketch is not None
    statistics = running.result()
    valid = sum(entry.count for entry in statistics)
    channels = []
    for number, (channel, entry) in enumerate(zip(image.channels, statistics, strict=True)):
        histogram = running.histogram(number, HISTOGRAM_BINS)
        channels.append(
            {
                **asdict(channel),
                "statistics": entry.to_json(),
                "histogram": list(histogram.counts),
                "histogram_edges": list(histogram.edges),
                "histogram_every": histogram.every,
            }
        )
    check = getattr(reader(source.reader), "verify", None)
    flags = check(source, statistics) if check is not None else None
    entry = {
        "valid_fraction": valid / (len(statistics) * math.prod(source.shape)),
        "flags": [*source.flags, *(flags or ())],
        "shown": shown_as(image.channels),
        "channels": channels,
    }
    return entry, sketch.views()


def describe_index(folder: str | Path) -> dict[str, Any]:
    """Return what an index folder holds: images by modality, groups, flags, ledger and split.

    Raises:
        IntegrityError: it is damaged.
    """
    index = Index.load(Path(folder))
    split = load_split(Path(folder), index.rows)
    modalities = []
    for name in sorted({row.modality for row in index}):
        rows = [row for row in index if row.modality == name]
        modalities.append(
            {
                "modality": Path(name).stem,
                "geometry": rows[0].geometry,
                "images": len(rows),
                "groups": len({row.group for row in rows}),
                "channels": dict(Counter(channel.name for row in rows for channel in row.channels)),
                "shapes": {" x ".join(map(str, key)): n for key, n in Counter(row.shape for row in rows).most_common()},
                "valid_fraction": sum(row.valid_fraction for row in rows) / len(rows),
            }
        )
    return {
        "images": len(index),
        "groups": len({row.group for row in index}),
        "modalities": modalities,
        "flags": dict(Counter(flag for row in index for flag in row.flags).most_common()),
        "ledger": {**index.ledger.counts, "reasons": index.ledger.reasons},
        "split": None if split is None else {**split.to_json(), "parts": split.counts},
        "fingerprint": index.fingerprint,
    }


def refused_lines(refused: dict[str, int]) -> Iterable[str]:
    """Yield a line for each reason that files are in no image for, with its way out."""
    for name, count in refused.items():
        reason = Reason[name]
        way = f"; {WAYS_OUT[reason]}" if reason in WAYS_OUT else ""
        yield f"{count} x {status(reason)}: {name}, {reason.value}{way}"
