"""What a foreign model is fed with, as a contract: channels, units and the numbers that scale them.

Three channels are red, green and blue in this order, the order of every RGB model of transformers and timm, with values
0 to 255 (modality `rgb`). Any other number needs a `contract.json` in the folder, as our own exports have: bands are
not guessed. Models are fed `(value * rescale_factor - mean) / std`, which in the unit of the values is
`(value - mean / rescale_factor) / (std / rescale_factor)`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError
from geomed_mae.models.contract import SMALLEST_FLOOR, ChannelContract, Contract
from geomed_mae.models.foreign.stored import read_json

CONTRACT = "contract.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images in [0, 1] (torchvision's and timm's default, MAE's released code)."""

RESCALE = 1 / 255
LARGEST = 1e12
"""No mean, standard deviation, centre or scale is larger."""

SECTIONS = ("input", "output", "timm")
"""What exports add to a contract; `timm` is what the first of them called `input`."""

WORDS = {"modality", "method", "name", "kind", "unit", "polarisation", "sequence", "pooling", "fingerprint"}
PAIRS = {"value_range": 2, "crop_2d": 2, "crop_3d": 3}
"""Entries of a contract that are text, and those that are lists, with their length; all others are numbers."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """How volumes, or images, were presented to an exported model: `size` and `patch` ([slices,] rows, columns)."""

    size: tuple[int, ...]
    patch: tuple[int, ...]


def described(folder: Path, channels: int) -> tuple[Contract, Layout | None] | None:
    """Return the contract that lies in the folder, and the layout that our exports add; None where there is none.

    Raises:
        ConfigError: it is no contract, describes another number of channels, or more than one modality.
        IntegrityError: it is not JSON.
    """
    if not (folder / CONTRACT).is_file():
        return None
    data = read_json(folder, CONTRACT)
    sections = {name: data.pop(name, None) for name in SECTIONS}
    layout = _layout(folder, sections["timm"] if sections["input"] is None else sections["input"])
    _check(folder, data)
    contract = Contract.from_json(json.dumps(data))
    depth = layout.patch[0] if layout and len(layout.patch) == 3 else 1
    modalities = {entry.modality for entry in contract.channels}
    if len(contract.channels) * depth != channels or len(modalities) != 1:
        raise ConfigError(
            f"'{folder}': {CONTRACT} describes {len(contract.channels)} channels of {len(modalities)} modalities, the "
            f"model takes {channels // depth} of one"
        )
    return contract, layout


def _check(folder: Path, data: dict[str, Any]) -> None:
    """Refuse values of the wrong kind: no manifest vouches for a contract that somebody wrote by hand.

    Raises:
        ConfigError: with the key and the value.
    """
    entries = data.get("channels")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("channel"), dict) for entry in entries
    ):
        raise ConfigError(f"'{folder}': {CONTRACT} lists no channels")
    for part in (data, *entries, *(entry["channel"] for entry in entries)):
        for key, value in part.items():
            if key not in ("channels", "channel") and not _fits(key, value):
                raise ConfigError(f"'{folder}': {CONTRACT} has {key} {repr(value)[:80]}, which is no such thing")


def _fits(key: str, value: Any) -> bool:
    """Return whether a value of a contract is of its key's kind: words, pairs and triples, or numbers."""
    if key in WORDS:
        return isinstance(value, str)
    if key in PAIRS:
        return value is None or (
            isinstance(value, list)
            and len(value) == PAIRS[key]
            and all(
                _is_number(part) and (key == "value_range" or (isinstance(part, int) and part > 0)) for part in value
            )
        )
    return _is_number(value) and (key != "scale" or value > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _layout(folder: Path, found: Any) -> Layout | None:
    if found is None:
        return None
    parts = [found.get(key) for key in ("size", "patch")] if isinstance(found, dict) else []
    for part in parts or [None]:
        whole = isinstance(part, list) and all(isinstance(value, int) and 0 < value < LARGEST for value in part)
        if not whole or len(part) not in (2, 3) or len(part) != len(parts[0]):
            raise ConfigError(
                f"'{folder}': section input of {CONTRACT} lacks size or patch, two or three whole numbers"
            )
    return Layout(tuple(parts[0]), tuple(parts[1]))


def rgb(
    folder: Path, channels: int, size: Sequence[int], *, mean: Any = None, std: Any = None, rescale: Any = RESCALE
) -> Contract:
    """Return the contract of a model of RGB images.

    Args:
        folder: named in messages.
        channels: of the model.
        size: of its training images in pixels (rows, columns).
        mean: of pixels after rescaling, one number a channel; None takes ImageNet's, and says so.
        std: the same.
        rescale: factor from values 0 to 255 to what mean and std are of.

    Raises:
        ConfigError: not three channels, or numbers that cannot scale anything.
    """
    from geomed_mae.modalities import load_modality  # late: model code must import without the YAML reader

    modality = load_modality("rgb")
    if channels != len(modality.channels):
        raise ConfigError(
            f"'{folder}' takes {channels} channels and does not say which. Put a {CONTRACT} into it that describes "
            "each (name, kind, unit, wavelength_nm ..., center, scale), in the form that `geomed-mae export --to timm` "
            "writes; three channels alone are taken for red, green, blue"
        )
    if mean is None or std is None:
        log.warning(
            "'%s' does not say how its images were scaled; ImageNet's mean and standard deviation are taken", folder
        )
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    means, stds = (_numbers(folder, value, channels) for value in (mean, std))
    (factor,) = _numbers(folder, [rescale], 1)
    if factor <= 0 or min(stds) <= 0:
        raise ConfigError(f"'{folder}': std {stds} and rescale_factor {factor} must be above 0")
    entries = [
        ChannelContract(
            modality=modality.name,
            channel=channel,
            method="fixed",
            center=center / factor,
            scale=scale / factor,
            noise_floor=max(modality.noise_floor * factor / scale, SMALLEST_FLOOR),
            value_range=modality.value_range,
        )
        for channel, center, scale in zip(modality.channels, means, stds, strict=True)
    ]
    return Contract(channels=tuple(entries), crop_2d=(size[0], size[1]))


def _numbers(folder: Path, values: Any, count: int) -> list[float]:
    listed = values if isinstance(values, list | tuple) else [values] * count
    numbers = [value for value in listed if _is_number(value)]
    if len(numbers) != count or len(listed) != count:
        raise ConfigError(
            f"'{folder}': mean, std and rescale_factor are numbers, one a channel, not {str(values)[:80]}"
        )
    return [float(number) for number in numbers]
