"""From Sources to Images: read one, read it where a codec may crash, read all that a path holds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, ReadError, TooManyBadInputsError
from geomed_mae.image import Image
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers.child import MEMORY_BYTES, SECONDS, in_child
from geomed_mae.readers.plausible import summary
from geomed_mae.readers.reasons import NOT_BAD, Reason
from geomed_mae.readers.registry import reader
from geomed_mae.readers.regular import believed, list_files, shown
from geomed_mae.readers.source import Refusal, Source, decoded_values, whole_window
from geomed_mae.readers.surveying import survey

VALUES_PER_SECOND = 1e6
"""Values that the slowest codec decodes and a scan examines in a second of processor time, with room: JPEG 2000 gives
some ten million."""
BYTES_PER_VALUE = 48
"""Memory for each value that is held at once: stored, as float64 while it is rescaled, as float32, valid, sorted."""

SHOWN = 5
"""Kinds of images that an error names."""

log = logging.getLogger(__name__)


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read a Source, or a window of it, as an Image.

    Raises:
        ReadError: with a typed reason, when the pixels do not decode or are not what the header promised.
    """
    module = reader(source.reader)
    return believed(lambda: module.read(source, window), source.files)


def read_guarded(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """As `read`, but what needs an image codec is decoded in a child process, which a hostile file may crash.

    Raises:
        ReadError: as `read`; also DECODE_FAILED when the codec crashes or hangs, TOO_LARGE when memory runs out.
    """
    if not source.codec:
        return read(source, window)
    spans = None if window is None else tuple((part.start, part.stop) for part in window)
    whole = whole_window(window, source.shape)
    values = len(source.channels) * math.prod(part.stop - part.start for part in whole)
    return in_child(_read_spans, source, spans, **limits(decoded_values(source, [whole]), at_once=values))


def _read_spans(source: Source, spans: tuple[tuple[int | None, int | None], ...] | None) -> Image:
    return read(source, None if spans is None else tuple(slice(*span) for span in spans))


def limits(values: int, *, at_once: int) -> dict[str, Any]:
    """Return limits for a child (`seconds`, `memory` in bytes) that decodes `values`, `at_once` of them at a time."""
    return {"seconds": SECONDS + values / VALUES_PER_SECOND, "memory": MEMORY_BYTES + BYTES_PER_VALUE * at_once}


def read_images(path: str | Path, modality: str | Sequence[str] = "auto") -> list[Image]:
    """Read every image in a file or folder, in this process except for image codecs (see `read_guarded`).

    Files that hold no image are passed over; files that are bad are counted by reason in a log line of level WARNING,
    since a list of images has no place for them (`scan` gives each file its line).

    Args:
        path: a file or a folder, searched through recursively.
        modality: a modality's name, a YAML file, several of these, or "auto".

    Raises:
        ReadError: the only file cannot be read; the message says why.
        TooManyBadInputsError: a folder holds nothing usable; the message counts the reasons.
        ConfigError: the path does not exist, or the modality is unknown.
    """
    path = Path(path)
    found = survey(list_files(path), resolve_modalities(modality), root=path if path.is_dir() else None)
    images: list[Image] = []
    refusals = list(found.refusals)
    for source in found.sources:
        try:
            images.append(_read_verified(source))
        except ReadError as error:
            refusals += [Refusal(file, Reason[error.reason], str(error)) for file in source.files]
    if not images:
        raise nothing_usable(path, refusals)
    if bad := [refusal for refusal in refusals if refusal.reason not in NOT_BAD]:
        log.warning("%d files were left out: %s", len(bad), _counted(bad))
    return images


def read_image(path: str | Path, modality: str | Sequence[str] = "auto") -> Image:
    """Read the one image in a file or folder; of several none is chosen, and none is read.

    Args:
        path: a file or a folder, searched through recursively.
        modality: as `read_images`.

    Raises:
        ConfigError: there is more than one image, or as `read_images`.
        ReadError, TooManyBadInputsError: as `read_images`.
    """
    path = Path(path)
    found = survey(list_files(path), resolve_modalities(modality), root=path if path.is_dir() else None)
    if not found.sources:
        raise nothing_usable(path, found.refusals)
    if len(found.sources) > 1:
        kinds = Counter(f"{source.modality} {'x'.join(map(str, source.shape))}" for source in found.sources)
        some = [f"{count} of {kind}" for kind, count in kinds.most_common(SHOWN)] + ["..."] * (len(kinds) > SHOWN)
        raise ConfigError(
            f"'{path}' holds {len(found.sources)} images ({', '.join(some)}), and one is wanted; give one file or one "
            "series, or read all with gm.read_images(PATH) and choose"
        )
    return _read_verified(found.sources[0])


def _read_verified(source: Source) -> Image:
    image = read_guarded(source)
    module = reader(source.reader)
    if hasattr(module, "verify"):
        module.verify(source, summary(image))
    return image


def nothing_usable(path: Path, refusals: Sequence[Refusal]) -> ReadError | TooManyBadInputsError:
    """Return the error that says why no image came out of `path`."""
    if not refusals:
        return TooManyBadInputsError(f"{path} holds no files; point to a folder with raw images")
    if len(refusals) == 1:
        only = refusals[0]
        detail = f" ({only.detail})" if only.detail else ""
        return ReadError(f"{shown(only.path)} cannot be used: {only.reason.value}{detail}", only.reason.name)
    example = next((refusal.detail for refusal in refusals if refusal.detail and refusal.reason not in NOT_BAD), "")
    example = f"; for example: {example}" if example else ""
    return TooManyBadInputsError(
        f"none of the {len(refusals)} files in {path} can be used: {_counted(refusals)}{example}"
    )


def _counted(refusals: Sequence[Refusal]) -> str:
    counts = Counter(refusal.reason for refusal in refusals)
    return ", ".join(f"{count} x {reason.name} ({reason.value})" for reason, count in sorted(counts.items()))
