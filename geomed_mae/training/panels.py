"""Panels: pictures of what a masked autoencoder saw and what it made of it, in physical units.

One row an example (a volume gives up to three: the fullest planes that are not slivers), four columns: the image, what
the encoder saw, the reconstruction (visible patches are the image's own) and the error, with a scale in the channel's
unit. Of the crops given, those with the most structure are shown, because air and open water say little; the errors
that are returned are those of all crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import OutputError
from geomed_mae.image import Channel
from geomed_mae.models.patches import patchify
from geomed_mae.samples.batch import Batch
from geomed_mae.training.objective import MaskedObjective, Reconstruction

NATURAL_NM = (665.0, 560.0, 490.0)
"""Red, green and blue of a natural-colour composite: the channels with the nearest wavelengths are shown."""

NATURAL_TOLERANCE_NM = 60.0
"""A channel further off than this is not a colour of the composite."""

STRETCH = (2.0, 98.0)
"""Percentiles of the shown values that become black and white."""

ERROR_PERCENTILE = 99.0
"""Percentile of the absolute error that ends the error's colour scale."""

HIDDEN_GREY, INVALID_WHITE = 0.45, 1.0
PLANES = ("row x column", "slice x column", "slice x row")
"""Planes across the slice, row and column axes; which of them is axial depends on how a volume was acquired."""

SLIVER = 0.3
"""A plane that is thinner than this share of its width is not drawn."""

ROWS = 6
"""Rows of a panel: six 2D crops, or two volumes of three planes."""

CANDIDATES = 24
"""Crops to give to `draw_reconstructions`, for errors that mean something and a choice that shows something."""

COLUMNS = ("image", "seen by the encoder", "reconstruction", "absolute error")
DPI = 150
CELL_INCHES = 2.3


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One row of a panel: `image` and `answer` (y, x, 1 or 3) in physical units, three masks (y, x).

    `aspect` is the height of a pixel over its width.
    """

    label: str
    image: np.ndarray
    answer: np.ndarray
    valid: np.ndarray
    seen: np.ndarray
    asked: np.ndarray
    aspect: float


def shown_channels(channels: Sequence[Channel]) -> tuple[int, ...]:
    """Return the channels to show: three for a natural-colour composite where there are such, else the first."""
    picked = []
    for wanted in NATURAL_NM:
        distances = [
            (abs(channel.wavelength_nm - wanted), index)
            for index, channel in enumerate(channels)
            if channel.kind == "optical" and channel.wavelength_nm is not None
        ]
        if not distances or min(distances)[0] > NATURAL_TOLERANCE_NM:
            return (0,)
        picked.append(min(distances)[1])
    return tuple(picked) if len(set(picked)) == len(picked) else (0,)


def most_structure(batch: Batch, patch: Sequence[int], count: int) -> list[int]:
    """Return the numbers, rising, of the `count` crops with the most structure; the model's answers play no part.

    Structure is the standard deviation of the patches' means in the first shown channel, in units of the image's own
    spread: noise averages out, and arbitrary units cancel.
    """
    first = shown_channels(batch.channels)[0]
    means = patchify(batch.raw[:, [first]].cpu(), patch)[:, :, 0].mean(-1)
    whole = patchify(batch.valid[:, [first]].cpu(), patch)[:, :, 0].all(-1)
    spreads = [
        float(mean[inside].std()) / own[first].spread if int(inside.sum()) > 1 else 0.0
        for mean, inside, own in zip(means, whole, batch.statistics, strict=True)
    ]
    return sorted(sorted(range(len(batch)), key=lambda number: -spreads[number])[:count])


def pictures(batch: Batch, made: Reconstruction, numbers: Sequence[int]) -> list[Picture]:
    """Cut the rows of a panel, for the crops `numbers`, out of a reconstructed batch."""
    chosen = list(shown_channels(batch.channels))
    rows = []
    for place, number in enumerate(numbers, start=1):
        spacing = [1.0] * (batch.raw.ndim - 2) if batch.spacing is None else batch.spacing[number].tolist()
        arrays = [
            np.moveaxis(array.numpy(), 0, -1)
            for array in (
                made.image[number][chosen],
                made.answer[number][chosen],
                batch.valid[number][chosen].any(dim=0, keepdim=True).cpu(),
                made.seen[number],
                made.asked[number][chosen].any(dim=0, keepdim=True),
            )
        ]
        inside = _extent(arrays[2][..., 0])
        arrays = [array[inside] for array in arrays]
        for label, index, (height, width) in _planes(arrays[2][..., 0], spacing):
            image, answer, valid, seen, asked = (array[index] for array in arrays)
            title = " · ".join(part for part in (f"example {place}", label) if part)
            rows.append(Picture(title, image, answer, valid[..., 0], seen[..., 0], asked[..., 0], height / width))
    return rows


def _extent(valid: np.ndarray) -> tuple[slice, ...]:
    """Return the box around all valid pixels of a crop (all of it when there are none): padding shows nothing."""
    box = []
    for axis in range(valid.ndim):
        places = np.flatnonzero(valid.any(axis=tuple(other for other in range(valid.ndim) if other != axis)))
        box.append(slice(places[0], places[-1] + 1) if places.size else slice(None))
    return tuple(box)


def _planes(valid: np.ndarray, spacing: Sequence[float]) -> list[tuple[str, tuple, tuple[float, float]]]:
    """Return label, index into the spatial axes and pixel (height, width) of each plane of a crop to show.

    Of a volume the fullest plane across each axis, the one next to the middle where several are equally full.
    """
    if valid.ndim == 2:
        return [("", (), (spacing[0], spacing[1]))]
    planes = []
    for axis, name in enumerate(PLANES):
        rest = [other for other in range(3) if other != axis]
        if axis > 0 and valid.shape[rest[0]] * spacing[rest[0]] < SLIVER * valid.shape[rest[1]] * spacing[rest[1]]:
            continue
        count = valid.sum(axis=tuple(rest))
        fullest = np.flatnonzero(count == count.max())
        chosen = int(fullest[np.abs(fullest - valid.shape[axis] // 2).argmin()])
        index = tuple(chosen if other == axis else slice(None) for other in range(3))
        planes.append((name, index, (spacing[rest[0]], spacing[rest[1]])))
    return planes


def _stretched(array: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    values = np.clip((array - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.repeat(values, 3, axis=-1) if values.shape[-1] == 1 else values


def _cells(row: Picture) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Return the first three cells as RGB (y, x, 3), the absolute error (y, x), and its mean over asked pixels."""
    reference = row.image[row.valid] if row.valid.any() else row.image.reshape(-1, row.image.shape[-1])
    low, high = np.percentile(reference, STRETCH, axis=0)
    image, answer = _stretched(row.image, low, high), _stretched(row.answer, low, high)
    masked = np.where(row.seen[..., None], image, HIDDEN_GREY)
    for cell in (image, masked, answer):
        cell[~row.valid] = INVALID_WHITE
    error = np.where(row.asked, np.abs(row.answer - row.image).mean(axis=-1), np.nan)
    return [image, masked, answer], error, float(error[row.asked].mean()) if row.asked.any() else 0.0


def draw(path: Path, rows: Sequence[Picture], *, title: str, unit: str) -> Path:
    """Draw a panel as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [_cells(row) for row in rows]
    heights = [min(max(row.image.shape[0] / row.image.shape[1] * row.aspect, 0.3), 1.6) for row in rows]
    width, height = CELL_INCHES * (len(COLUMNS) + 0.45), CELL_INCHES * sum(heights) + 0.22 * len(rows) + 0.75
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9.5, x=0.01, ha="left")
    axes = figure.subplots(len(rows), len(COLUMNS), squeeze=False, height_ratios=heights)
    for line, (row, (shown, error, mean), cell) in enumerate(zip(axes, cells, rows, strict=True)):
        for axis, picture in zip(row, shown, strict=False):
            axis.imshow(picture, aspect=cell.aspect, interpolation="nearest")
        _draw_error(figure, row[-1], error, cell.aspect, unit)
        row[0].set_ylabel(cell.label, fontsize=7.5)
        row[-1].set_xlabel(f"mean {mean:.3g} {unit}", fontsize=7)
        for axis, name in zip(row, COLUMNS, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if line == 0:
                axis.set_title(name, fontsize=8.5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No "Software" entry: a picture of the same model is the same file.
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise OutputError(f"the picture '{path.name}' cannot be written: {error.strerror or error}") from error
    return path


def _draw_error(figure: Any, axis: Any, error: np.ndarray, aspect: float, unit: str) -> None:
    """Draw the absolute error of asked pixels with its colour bar; what was not asked stays white."""
    finite = error[np.isfinite(error)]
    limit = float(np.percentile(finite, ERROR_PERCENTILE)) if finite.size else 0.0
    drawn = axis.imshow(error, aspect=aspect, cmap="magma", vmin=0, vmax=limit or 1.0, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.02)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.set_label(unit, fontsize=6.5)
    bar.outline.set_visible(False)


def caption(batch: Batch, mask_ratio: float, patch: Sequence[int]) -> str:
    """Return a panel's title: modality, what is shown, mask ratio, patch and spacing."""
    names = [batch.channels[index].name for index in shown_channels(batch.channels)]
    shown = f"{'/'.join(names)} of {len(batch.channels)} channels" if len(batch.channels) > 1 else names[0]
    parts = [batch.modality, shown, f"{mask_ratio:.0%} of patches hidden", f"patch {' x '.join(map(str, patch))}"]
    if batch.spacing is not None:
        unit = "m" if batch.channels[0].kind in ("optical", "thermal", "sar", "elevation") else "mm"
        parts.append(f"spacing {' x '.join(f'{value:.3g}' for value in batch.spacing[0].tolist())} {unit}")
    return "  ·  ".join(parts)


def draw_reconstructions(objective: MaskedObjective, batch: Batch, path: Path) -> dict[str, dict[str, Any]]:
    """Reconstruct a batch, draw some of its crops to `path`, and return the errors of all (see `error_summary`).

    The masks are those of the batch's own step number.

    Raises:
        OutputError: the file cannot be written.
    """
    device = next(objective.mae.parameters()).device
    made = objective.reconstruct(batch.to(device), batch.step)
    patch = objective.mae.spec.patch(batch.raw.ndim - 2)
    ratio = objective.masking.ratio_at((objective.seed, batch.step))
    # A crop gives one row or more; the first that do not fit any more are left out.
    rows = pictures(batch, made, most_structure(batch, patch, ROWS))[:ROWS]
    draw(path, rows, title=caption(batch, ratio, patch), unit=batch.channels[0].unit)
    return error_summary(batch, made)


def error_summary(batch: Batch, made: Reconstruction) -> dict[str, dict[str, Any]]:
    """Return per channel `mean_absolute_error` with its `unit`, and `r_squared`, over asked pixels.

    `r_squared` is 1 - squared error / squared deviation from each crop's own mean, both summed over all crops: 0 for a
    model that knows every crop's mean and nothing else. Each crop counts in units of its image's spread, so that
    arbitrary units cancel, and flat crops, in which there is nothing to explain, weigh little.
    """
    result = {}
    for index, channel in enumerate(batch.channels):
        absolute, count, squared, deviation = 0.0, 0, 0.0, 0.0
        crops = zip(made.image[:, index], made.answer[:, index], made.asked[:, index], batch.statistics, strict=True)
        for image, answer, asked, own in crops:
            truth = image[asked].double()
            if not len(truth):
                continue
            error, spread = answer[asked].double() - truth, own[index].spread
            absolute += float(error.abs().sum())
            count += len(truth)
            squared += float(error.square().sum()) / spread**2
            deviation += float((truth - truth.mean()).square().sum()) / spread**2
        if deviation > 0:
            result[channel.name] = {
                "mean_absolute_error": round(absolute / count, 4),
                "unit": channel.unit,
                "r_squared": round(1 - squared / deviation, 4),
            }
    return result
