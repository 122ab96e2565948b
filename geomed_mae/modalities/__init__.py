"""Modalities: the meaning of pixels, one YAML file each. Format is not modality: MR comes in DICOM and in NIfTI.

A modality file says (see `rgb.yaml` for the shortest, `sentinel2_l2a.yaml` for the fullest):

    name            as recipes and `--modality` spell it
    title           one line for people
    geometry        raster | volume | plane
    formats         readers that may carry it: geotiff, dicom, nifti, picture ...
    dicom           values of DICOM's Modality (0008,0060) that mean this modality
    unit            physical unit of every channel (a channel may override)
    scale, offset   stored value * scale + offset = physical value; applied where the file itself declares none
    nodata          stored value that means "no data" where the file itself declares none
    value_range     physical values are clipped to this range on their way into a model, not in the Image
    normalise       how physical values become model input, see `Normalisation`
    noise_floor     physical standard deviation under which a patch is noise (targets are not blown up below it)
    flips           symmetries of the scene: y, x, z, rot90
    channels        list of name, aliases and physics; the order is the order of unnamed bands
    leave_out_bands names of bands that come along and are no channels (quality maps, previews); they are left out, with
                    a flag, where the user named the modality
    bind            how series of one study become channels of one image, see `binding`
    scene           how the band files of one scene are recognised, see `scene`

Everything is data: adding a modality is adding a file here, or passing `--modality my_sensor.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, suggest
from geomed_mae.image import Channel
from geomed_mae.modalities.binding import Binding, parse_binding
from geomed_mae.modalities.scene import SceneRule, parse_scene
from geomed_mae.safe_yaml import read_yaml

GEOMETRIES = ("raster", "volume", "plane")
FLIPS = ("y", "x", "z", "rot90")


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """How physical values become model input: (value - center) / scale.

    `method` says where center and scale come from: `fixed` (the two numbers here: absolute units such as HU, where
    every image of the world shares one scale), `archive` (median and robust spread per channel over the index) or
    `image` (the same per image and channel, for arbitrary units such as MR). Robust spread is
    (p95 - p5) / 3.29, the standard deviation of a normal distribution with these percentiles.
    """

    method: str
    center: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("fixed", "archive", "image"):
            raise ConfigError(f"normalise.method is '{self.method}'; known: fixed, archive, image")
        if not self.scale > 0:
            raise ConfigError(f"normalise.scale is {self.scale}; it must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """The parsed and checked form of a modality file; fields as in the module's docstring.

    `noise_floor` is in the physical unit, for method `image` as a fraction of the image's robust spread.
    """

    name: str
    title: str
    geometry: str
    formats: tuple[str, ...]
    unit: str
    normalise: Normalisation
    channels: tuple[Channel, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict, hash=False)
    leave_out_bands: tuple[str, ...] = ()
    dicom: tuple[str, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    nodata: float | None = None
    value_range: tuple[float, float] | None = None
    noise_floor: float = 0.0
    flips: tuple[str, ...] = ()
    bind: Binding | None = None
    scene: SceneRule | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ConfigError(f"modality '{self.name}': geometry '{self.geometry}' is none of {', '.join(GEOMETRIES)}")
        if unknown := set(self.flips) - set(FLIPS):
            raise ConfigError(f"modality '{self.name}': flips {sorted(unknown)} are none of {', '.join(FLIPS)}")

    def leaves_out(self, name: str) -> bool:
        """Say whether a band of this name comes along and is no channel; case aside."""
        return name.strip().casefold() in {left.casefold() for left in self.leave_out_bands}

    def channel(self, name: str) -> Channel | None:
        """Return the channel called `name`, its name or alias compared without case, or None."""
        wanted = self.aliases.get(name.strip().casefold())
        return next((channel for channel in self.channels if channel.name == wanted), None)


def _channel(entry: dict[str, Any], unit: str, path: Path) -> tuple[Channel, list[str]]:
    entry = dict(entry)
    aliases = [str(alias) for alias in entry.pop("aliases", ())]
    known = {f.name for f in fields(Channel)}
    for key in entry:
        if key not in known:
            raise ConfigError(f"{path.name}: a channel has no field '{key}'; {suggest(key, known)}")
    return Channel(**{"unit": unit, **entry}), aliases


def parse_modality(path: Path) -> Modality:
    """Read and check one modality file.

    Raises:
        ConfigError: with the file, the field and what is allowed there.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} is not a modality file: it holds no mapping of fields")
    known = {f.name for f in fields(Modality)} - {"aliases"}
    for key in data:
        if key not in known:
            raise ConfigError(f"{path.name}: unknown field '{key}'; {suggest(str(key), known)}")
    left = data.get("leave_out_bands") or ()
    if isinstance(left, str) or not all(isinstance(name, str) for name in left):
        raise ConfigError(f"{path.name}: leave_out_bands is {left!r}; write a list of band names")
    missing = [name for name in ("name", "title", "geometry", "formats", "unit", "normalise") if name not in data]
    if missing:
        raise ConfigError(f"{path.name}: missing field '{missing[0]}'")
    channels, aliases, patterns = [], {}, {}
    for entry in data.get("channels") or ():
        channel, names = _channel({key: entry[key] for key in entry if key != "series"}, data["unit"], path)
        channels.append(channel)
        if "series" in entry:
            patterns[channel.name] = entry["series"]
        for name in (channel.name, *names):
            if aliases.setdefault(name.casefold(), channel.name) != channel.name:
                raise ConfigError(f"{path.name}: the name '{name}' means two channels")
    try:
        return Modality(
            **{
                **data,
                "formats": tuple(data["formats"]),
                "dicom": tuple(data.get("dicom") or ()),
                "leave_out_bands": tuple(left),
                "flips": tuple(data.get("flips") or ()),
                "normalise": Normalisation(**data["normalise"]),
                "value_range": tuple(data["value_range"]) if data.get("value_range") else None,
                "channels": tuple(channels),
                "bind": parse_binding(data.get("bind"), [channel.name for channel in channels], patterns, path.name),
                "scene": parse_scene(data.get("scene"), path.name),
                "aliases": aliases,
            }
        )
    except TypeError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def modality_names() -> list[str]:
    """Return the names of the modalities that travel with the package."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.yaml"))


@cache
def _packaged(name: str) -> Modality:
    return parse_modality(Path(__file__).parent / f"{name.replace('-', '_')}.yaml")


def load_modality(name_or_path: str) -> Modality:
    """Return a modality by name ("sentinel2-l2a") or from a file of the user's ("my_sensor.yaml").

    Raises:
        ConfigError: unknown name (the nearest is named), or a bad file.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return parse_modality(Path(name_or_path))
    names = modality_names()
    if name_or_path.replace("_", "-") not in names:
        raise ConfigError(f"no modality '{name_or_path}'; {suggest(name_or_path, names)}, or give a .yaml file")
    return _packaged(name_or_path.replace("_", "-"))


def resolve_modalities(wanted: str | Sequence[str] | Sequence[Modality]) -> tuple[Modality, ...]:
    """Return the candidates that readers may choose from; "auto" means all that travel with the package."""
    if wanted == "auto" or list(wanted) == ["auto"]:
        return tuple(_packaged(name) for name in modality_names())
    wanted = [wanted] if isinstance(wanted, str) else wanted
    return tuple(entry if isinstance(entry, Modality) else load_modality(entry) for entry in wanted)
