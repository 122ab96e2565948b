"""The verb inspect: what is in a file, a folder or an index, for a person or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.card import physics
from geomed_mae.archives.index import is_index
from geomed_mae.archives.inspection import Inspection, describe_index, look_into, refused_lines
from geomed_mae.archives.pictures import Tile, contact_sheet
from geomed_mae.archives.terminal import terminal_picture
from geomed_mae.archives.views import View
from geomed_mae.errors import ConfigError, OutputError
from geomed_mae.image import Channel

__all__ = ["as_text", "describe_index", "index_as_text", "inspect", "is_index", "look_into", "save_picture"]

BARS = " ▁▂▃▄▅▆▇█"
AXES = {3: "channel, row, column", 4: "channel, slice, row, column"}


def inspect(path: str | Path, modality: str = "auto") -> list[dict[str, Any]]:
    """Return what is in `path`: one dictionary of plain values an image, all of them in full.

    Raises:
        as `look_into`.
    """
    return list(look_into(path, modality, full=True).images)


def save_picture(inspection: Inspection, path: Path, heading: str = "") -> Path:
    """Write a contact sheet of the images described in full.

    Raises:
        ConfigError: the ending is no picture's, or no image was described in full. OutputError: it cannot be written.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--picture '{path}': give a name that ends in .png or .jpg")
    tiles = [
        Tile(views, f"{'x'.join(map(str, inspection.images[number - 1]['shape'][1:]))}")
        for number, views in inspection.views.items()
    ]
    if not tiles:
        raise ConfigError("no image's pixels were read; choose some with --image N or --all")
    names = sorted({inspection.images[number - 1]["modality"] for number in inspection.views})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(tiles, heading or ", ".join(names)).save(path)
    except OSError as error:
        raise OutputError(f"the picture cannot be written to '{path}': {error.strerror or error}") from error
    return path


def as_text(inspection: Inspection, *, columns: int = 76) -> str:
    """Return an inspection as a page for a terminal: images described in full with a thumbnail, others in one line."""
    lines: list[str] = []
    total = len(inspection.images)
    for entry in inspection.images:
        number = entry["number"]
        if number in inspection.views:
            lines += [*_full(entry, total), *_thumbnail(entry, inspection.views[number], columns), ""]
        elif "refused" in entry:
            lines += [f"image {number} of {total}: {entry['refused']['reason']}, {entry['refused']['detail']}", ""]
        else:
            lines.append(_line(entry))
    if total > len(inspection.views) and not any("refused" in entry for entry in inspection.images):
        lines.append(f"{total} images; pixels of one with --image N, of all with --all")
    if inspection.refused:
        lines += ["files that are in no image:", *(f"  {line}" for line in refused_lines(inspection.refused))]
    return "\n".join(lines).rstrip()


def _unit(entry: dict[str, Any]) -> str:
    return "m" if entry["geometry"]["kind"] == "raster" else "mm"


def _spacing(entry: dict[str, Any]) -> str:
    spacing = entry["geometry"]["spacing"]
    return f"{' x '.join(f'{value:.6g}' for value in spacing)} {_unit(entry)}" if spacing else "unknown"


def _line(entry: dict[str, Any]) -> str:
    names = [channel["name"] for channel in entry["channels"]]
    more = "" if len(names) <= 6 else f" and {len(names) - 6} others"
    flags = f"  {' '.join(entry['flags'])}" if entry["flags"] else ""
    size = " x ".join(map(str, entry["shape"][1:]))
    return f"{entry['number']:>5}  {entry['modality']}  {size}  {_spacing(entry)}  {', '.join(names[:6])}{more}{flags}"


def _full(entry: dict[str, Any], total: int) -> list[str]:
    geometry = entry["geometry"]
    files = f", {entry['files']} files" if entry["files"] > 1 else ""
    lines = [
        f"image {entry['number']} of {total}: {entry['modality']} {geometry['kind']}",
        f"  stored as {entry['dtype']}{files}",
        f"  shape     {' x '.join(map(str, entry['shape']))} ({AXES[len(entry['shape'])]})",
        f"  spacing   {_spacing(entry)}",
        f"  valid     {entry['valid_fraction']:.2%}",
    ]
    if geometry["kind"] == "raster":
        lines.append(f"  crs       {_crs_name(geometry['crs'])}")
        lines.append(f"  transform {', '.join(f'{value:.10g}' for value in geometry['transform'])}")
        if geometry["centre"] is not None:
            lines.append(f"  centre    {_place(*geometry['centre'])}")
    if geometry["kind"] == "volume":
        runs = (f"{name} run {letters[0]}->{letters[1]}" for name, letters in geometry["axes"].items())
        lines.append(f"  axes      {', '.join(runs)}; tilt {geometry['tilt_degrees']:g} degrees")
        rows = ("  ".join(f"{value:10.4f}" for value in row) for row in geometry["affine_lps"])
        lines += ["  affine    (slice, row, column) -> LPS mm"] + [f"            {row}" for row in rows]
    lines.append(f"  flags     {', '.join(entry['flags']) or 'none'}")
    return lines + _channels(entry["channels"])


def _channels(channels: Sequence[dict[str, Any]]) -> Iterable[str]:
    known = Channel.__dataclass_fields__
    what = [physics([Channel(**{name: value for name, value in each.items() if name in known})]) for each in channels]
    wide = max(10, *(len(each["name"]) for each in channels))
    broad = max(8, *(len(text) for text in what))
    head = f"{'min':>10} {'median':>10} {'max':>10}  0.5 % to 99.5 %"
    lines = [f"  {'channel':<{wide}} {'physics':<{broad}} {'unit':<12} {head}"]
    for channel, text in zip(channels, what, strict=True):
        values = channel["statistics"]
        top = max(*channel["histogram"], 1)
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in channel["histogram"])
        numbers = " ".join(f"{values[name]:>10.5g}" for name in ("minimum", "median", "maximum"))
        lines.append(f"  {channel['name']:<{wide}} {text:<{broad}} {channel['unit']:<12} {numbers}  {bars}")
    return lines


def _thumbnail(entry: dict[str, Any], views: Sequence[View], columns: int) -> list[str]:
    view = views[0]
    edges = f", {view.edges[0]} left, {view.edges[2]} at the top" if view.edges else ""
    title = f"{view.label} plane{edges}" if view.label else entry["shown"]
    return ["", f"  {title}:", *(f"  {line}" for line in terminal_picture(view, columns))]


def _place(longitude: float, latitude: float) -> str:
    return f"{abs(latitude):.4f} {'N' if latitude >= 0 else 'S'}, {abs(longitude):.4f} {'E' if longitude >= 0 else 'W'}"


def _crs_name(wkt: str | None) -> str:
    """Return the quoted name at the head of a WKT string."""
    return "none" if wkt is None else wkt.split('"')[1] if '"' in wkt else wkt


def index_as_text(description: dict[str, Any]) -> str:
    """Return `describe_index`'s result as a page for a terminal."""
    ledger = description["ledger"]
    lines = [
        f"index of {description['images']} images in {description['groups']} groups (patients or scenes)",
        f"  files     {ledger['files']} = {ledger['used']} used + {ledger['skipped']} skipped "
        f"+ {ledger['unsupported']} unsupported",
        *(f"            {line}" for line in refused_lines(ledger["reasons"])),
    ]
    for entry in description["modalities"]:
        shapes = [f"{count} x ({shape})" for shape, count in entry["shapes"].items()]
        more = f" and {len(shapes) - 4} other sizes" if len(shapes) > 4 else ""
        names = [f"{name} ({count})" if count < entry["images"] else name for name, count in entry["channels"].items()]
        lines += [
            f"  {entry['modality']} ({entry['geometry']})",
            f"    images   {entry['images']} in {entry['groups']} groups, {entry['valid_fraction']:.2%} valid",
            f"    size     {', '.join(shapes[:4])}{more}",
            f"    channels {', '.join(names)}",
        ]
    flags = ", ".join(f"{count} x {name}" for name, count in description["flags"].items())
    lines.append(f"  flags     {flags or 'none'}")
    split = description["split"]
    parts = ", ".join(f"{name} {count}" for name, count in split["parts"].items()) if split else ""
    lines.append(f"  split     {'by ' + split['method'] + ': ' + parts if split else 'none stored'}")
    return "\n".join(lines)
