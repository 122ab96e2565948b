"""Class maps and probabilities as DICOM Segmentation objects (PS3.3 A.51, C.8.20); `dicom_object` makes the object.

Every class but one called "background" is a segment, in the order of the classes, with a coded meaning (see
`dicom_codes`) and the colour that it has in the other formats; a class that occurs nowhere stays a described segment.
Pixels that are not valid are in no segment.
A BINARY segmentation holds the class map, a FRACTIONAL one the probabilities of the segments.

The standard demands the patient and the study of the source in the object (see `readers.dicom.origin`), and the date of
its creation. UIDs are random. Nothing else of the source and nothing of this machine is in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from geomed_mae.errors import ConfigError
from geomed_mae.image import PlaneGeometry, VolumeGeometry
from geomed_mae.readers.dicom.origin import Origin
from geomed_mae.writers import check_classes, complete_file, stored_chances
from geomed_mae.writers.dicom_codes import segment_meaning, segment_numbers
from geomed_mae.writers.dicom_object import About, build_object, load_highdicom, save_object
from geomed_mae.writers.legend import colours

SUFFIX = ".dcm"
GEOMETRIES = ("volume", "plane")
MOST_BYTES = 2**32 - 2
"""Of an element of native pixels, whose length is an even number of 32 bits (PS3.5 section 7.1.2)."""


def require() -> None:
    """Make sure that files can be written, before anything is computed.

    Raises:
        MissingExtraError: highdicom is not installed.
    """
    load_highdicom()


def check_chances(shape: tuple[int, ...], classes: tuple[str, ...]) -> None:
    """Make sure that the probabilities of an image of `shape` fit into one object, a byte a voxel and segment.

    Raises:
        ConfigError: they do not.
    """
    size = math.prod(shape) * len(segment_numbers(classes))
    if size > MOST_BYTES:
        raise ConfigError(
            f"the probabilities of {len(segment_numbers(classes))} segments of {' x '.join(map(str, shape))} voxels "
            f"take {size / 2**30:.1f} GiB, and a DICOM object holds 4; leave --probabilities out, or use --format nifti"
        )


class Segments:
    """A class map, or probabilities, that are being collected from the first slice (of a plane: row) to the last."""

    def __init__(self, shape: tuple[int, ...], classes: tuple[str, ...], *, chances: bool) -> None:
        self.numbers = segment_numbers(classes)
        if not self.numbers:
            raise ConfigError(f"the classes {', '.join(classes)} leave no segment for a DICOM SEG")
        self._classes, self._chances, self._next = classes, chances, 0
        self.array = np.zeros((len(self.numbers), *shape) if chances else shape, dtype=np.uint8)

    def put(self, part: np.ndarray) -> None:
        """Take the next slices or rows: uint8 (slices, ...) class numbers, or float (class, slices, ...) of 0 to 1.

        Probabilities that are NaN mean a pixel that is not valid: it is in no segment.

        Raises:
            ValueError: class numbers that are not uint8, or that name no class.
        """
        count = part.shape[1] if self._chances else part.shape[0]
        place = slice(self._next, self._next + count)
        if self._chances:
            self.array[:, place] = stored_chances(part)[0][list(self.numbers)]
        else:
            check_classes(part, self._classes)
            self.array[place] = part
        self._next += count

    def labels(self) -> np.ndarray:
        """Return the class map as segment numbers, uint8 from 1; 0 is no segment."""
        table = np.zeros(256, dtype=np.uint8)
        table[list(self.numbers)] = np.arange(1, len(self.numbers) + 1)
        return table[self.array]


@contextmanager
def stream(
    path: Path,
    shape: tuple[int, ...],
    geometry: VolumeGeometry | PlaneGeometry,
    classes: tuple[str, ...],
    *,
    origin: Origin,
    codes: Mapping[str, Mapping[str, str]] | None = None,
    model: str = "",
) -> Iterator[Segments]:
    """Collect a class map of `shape` ([slices,] rows, columns) and write it as a BINARY segmentation.

    Args:
        path: file to write.
        shape: of the image.
        geometry: of the image; the frames lie where `origin` says that its slices lie, which is the same place.
        classes: names in the order of their numbers.
        origin: patient, study and slices of the image.
        codes: a recipe's `head.codes`.
        model: digest of the model, "" to leave it out.

    Raises:
        ConfigError: there is no segment among the classes, or a code is none.
        OutputError: the file cannot be written.
        MissingExtraError: highdicom is not installed.
    """
    target = Segments(shape, classes, chances=False)
    about = describe(origin, classes, codes, model)
    yield target
    _write(path, target.labels(), about, fractional=False)


@contextmanager
def stream_chances(
    path: Path,
    shape: tuple[int, ...],
    geometry: VolumeGeometry | PlaneGeometry,
    classes: tuple[str, ...],
    *,
    origin: Origin,
    codes: Mapping[str, Mapping[str, str]] | None = None,
    model: str = "",
) -> Iterator[Segments]:
    """Collect probabilities and write them as a FRACTIONAL segmentation of type PROBABILITY.

    Args, Raises: as `stream`; `put` takes float32 (class, slices, ...).
    """
    target = Segments(shape, classes, chances=True)
    about = describe(origin, classes, codes, model)
    yield target
    _write(path, target.array, about, fractional=True)


def write(
    path: Path,
    array: np.ndarray,
    geometry: VolumeGeometry | PlaneGeometry,
    classes: tuple[str, ...],
    *,
    origin: Origin,
    codes: Mapping[str, Mapping[str, str]] | None = None,
    model: str = "",
) -> Path:
    """Write a class map, uint8 ([slices,] rows, columns), in one piece; Args, Raises: as `stream`."""
    with stream(path, array.shape, geometry, classes, origin=origin, codes=codes, model=model) as target:
        target.put(array)
    return path


def describe(
    origin: Origin, classes: tuple[str, ...], codes: Mapping[str, Mapping[str, str]] | None, model: str
) -> About:
    """Return what an object says of itself; Args, Raises: as `stream`."""
    numbers, table = segment_numbers(classes), colours(len(classes))
    segments = tuple(segment_meaning(classes[number], codes) for number in numbers)
    return About(origin, segments, tuple(table[number][:3] for number in numbers), model)


def _write(path: Path, array: np.ndarray, about: About, *, fractional: bool) -> None:
    planes = 1 if about.origin.positions is None else len(about.origin.positions)
    shape = (-1, planes, *array.shape[-2:]) if fractional else (planes, *array.shape[-2:])
    made = build_object(array.reshape(shape), about, fractional=fractional)
    with complete_file(path) as final:
        save_object(made, final)
