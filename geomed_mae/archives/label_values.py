"""What label values mean: from a recipe to a LabelQuery, from stored values to class numbers, and which pixels are held
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.archives.labels import LabelledImage
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE, LabelQuery

if TYPE_CHECKING:
    from geomed_mae.config import LabelConfig


def label_query(config: LabelConfig, classes: Sequence[str]) -> LabelQuery:
    """Return what a recipe asks of label files; the image's identity is added per image.

    Raises:
        ConfigError: labels.values leads to a class that head.classes does not name.
    """
    if wrong := sorted(number for number in (config.values or {}).values() if not 0 <= number < len(classes)):
        raise ConfigError(
            f"labels.values leads to class {wrong[0]}, but head.classes names 0 to {len(classes) - 1} "
            f"({', '.join(classes)})"
        )
    return LabelQuery(
        classes=tuple(classes),
        values=None if config.values is None else {str(key): number for key, number in config.values.items()},
        column=config.column,
        ignore=config.ignore,
        resample=config.resample,
    )


def target_of(entry: LabelledImage, config: LabelConfig, classes: Sequence[str]) -> np.ndarray:
    """Return class numbers, int16, of a labelled image under a recipe.

    Raises:
        ConfigError: a stored value has no class; the message names the label file and the image.
    """
    if entry.named:
        return entry.stored
    values = None
    if config.values is not None:
        values = {key: number for key, number in config.values.items() if isinstance(key, int)}
    try:
        return class_numbers(entry.stored, values, classes)
    except ConfigError as error:
        raise ConfigError(f"{entry.place}: {error}") from None


def class_numbers(stored: np.ndarray, values: Mapping[int, int] | None, classes: Sequence[str]) -> np.ndarray:
    """Return class numbers, int16, of stored label values; IGNORE stays IGNORE.

    Args:
        stored: int16 values as read.
        values: stored value -> class number, values not listed become IGNORE; None takes values as class numbers.
        classes: class names in the order of their numbers.

    Raises:
        ConfigError: a value or a number has no class; the keys to set are named.
    """
    if values is not None:
        if wrong := sorted(number for number in values.values() if not 0 <= number < len(classes)):
            raise ConfigError(
                f"labels.values leads to class {wrong[0]}, but head.classes names 0 to {len(classes) - 1} "
                f"({', '.join(classes)})"
            )
        if not values:
            raise ConfigError(
                "labels.values lists names alone, but this file stores numbers; list the numbers, for example {255: 1}"
            )
        numbers = np.full(stored.shape, IGNORE, dtype=np.int16)
        for value, number in values.items():
            numbers[stored == value] = number
        return numbers
    present = np.unique(stored)
    if stray := [int(value) for value in present if value != IGNORE and not 0 <= value < len(classes)]:
        raise ConfigError(
            f"label values {stray[:5]} have no class: head.classes names {len(classes)} "
            f"({', '.join(classes)}); name more, map values with labels.values, for example {{255: 1}}, or list those "
            "that mean 'not known' in labels.ignore"
        )
    return stored


def block_split(shape: Sequence[int], block_px: int, fraction: float, seed: int) -> np.ndarray:
    """Return bool of `shape`: True in the blocks held out for validation, about `fraction` of the area.

    Blocks of `block_px` pixels a side lie like the fields of a checkerboard; every n-th diagonal is held out, n being
    1 / fraction rounded (2 is the checkerboard itself) and the first one the seed's. Neighbouring blocks are correlated
    (Ploton et al. 2020, s41467-020-18321-y): scores on them are optimistic, and say less than those on another scene.
    """
    period = max(2, round(1 / fraction))
    diagonal = sum(np.ogrid[tuple(slice(size) for size in shape)][axis] // block_px for axis in range(len(shape)))
    return np.broadcast_to(diagonal % period == seed % period, tuple(shape))
