"""Panels: pictures of what a masked autoencoder saw and what it made of it, in physical units.

One row an example (a volume gives up to three, one a plane), four columns: the image, what the encoder saw, the
reconstruction (visible patches are the image's own) and the error, with scales in the channel's unit. Of the crops
given, those with the most structure are shown, because air and open water say little; the errors that are returned are
those of all crops. See `archives.planes` for what is drawn how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.planes import Letters, shown_groups
from geomed_mae.errors import OutputError
from geomed_mae.models.patches import patchify
from geomed_mae.samples.batch import Batch
from geomed_mae.training.live_files import BOXES
from geomed_mae.training.objective import MaskedObjective, Reconstruction
from geomed_mae.training.pictures import Crop, Picture, rows_of

ERROR_PERCENTILE = 99.0
"""Percentile of the absolute error that ends the error's colour scale."""

HIDDEN, INVALID = (0.56, 0.64, 0.74), (1.0, 1.0, 1.0)
"""Colours of hidden patches, blue so that no grey of an image is like it, and of pixels that are not valid."""

ROWS = 6
"""Rows of a panel: six 2D crops, or two volumes of three planes."""

CANDIDATES = 24
"""Crops to give to `draw_reconstructions`, for errors that mean something and a choice that shows something."""

DPI = 150
CELL, GAP, SCALE, LEFT, TOP, BELOW = 2.1, 0.07, 0.62, 0.3, 0.6, 0.27
"""Inches: widest cell, space between cells, room of a colour scale, left margin, heading, space below a row."""

APART, TWO_LINES = 0.06, 6.5
"""Inches between the labels of two rows; points of the letters of a row's label where two lines share the margin."""

COLUMNS = {
    "image": LEFT,
    "seen by the encoder": LEFT + CELL + GAP,
    "reconstruction": LEFT + 2 * (CELL + GAP),
    "absolute error": LEFT + 3 * CELL + 2 * GAP + SCALE,
}
"""Name and left edge, in inches, of each column."""

WIDTH = LEFT + 4 * CELL + 2 * GAP + 2 * SCALE
TALLEST = 1.5
"""Largest height of a cell over the widest width."""


def most_structure(batch: Batch, made: Reconstruction, patch: Sequence[int], count: int) -> list[int]:
    """Return the numbers, rising, of the `count` crops with the most structure; the model's answers play no part.

    Structure is the standard deviation of the patches' means in the first shown channel, in units of the image's own
    spread: noise averages out, and arbitrary units cancel.
    """
    first = shown_groups(batch.channels)[0][0]
    means = patchify(made.image[:, [first]], patch)[:, :, 0].mean(-1)
    whole = patchify(batch.valid.cpu().expand(made.image.shape)[:, [first]], patch)[:, :, 0].all(-1)
    spreads = [
        float(mean[inside].std()) / own[first].spread if int(inside.sum()) > 1 else 0.0
        for mean, inside, own in zip(means, whole, batch.statistics, strict=True)
    ]
    return sorted(sorted(range(len(batch)), key=lambda number: -spreads[number])[:count])


def pictures(
    batch: Batch, made: Reconstruction, numbers: Sequence[int], sides: Mapping[str, Letters] | None = None
) -> list[Picture]:
    """Cut the rows of a panel, for the crops `numbers`, out of a reconstructed batch.

    `sides` is image key -> letters of its axes (`pictures.sides`); planes of other volumes are named after array axes.
    """
    rows = []
    for place, number in enumerate(numbers, start=1):
        axes = made.image.ndim - 2
        spacing = [1.0] * axes if batch.spacing is None else batch.spacing[number].tolist()
        crop = Crop(
            image=made.image[number].numpy(),
            answer=made.answer[number].numpy(),
            valid=batch.valid[number].cpu().expand(made.image.shape[1:]).numpy(),
            seen=made.seen[number, 0].numpy(),
            asked=made.asked[number].numpy(),
            spacing=spacing,
            letters=(sides or {}).get(batch.keys[number]) if axes == 3 else None,
        )
        rows += rows_of(crop, batch.channels, place)
    return rows


def _stretched(array: np.ndarray, row: Picture) -> np.ndarray:
    from matplotlib import colormaps

    # A broken model may answer with NaN; its picture is black there.
    values = np.nan_to_num((array - row.window.low) / (row.window.high - row.window.low), posinf=1.0, neginf=0.0)
    values = np.clip(values, 0, 1)
    return colormaps[row.window.colours](values[..., 0])[..., :3] if values.shape[-1] == 1 else values


def _cells(row: Picture) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Return the first three cells as RGB (y, x, 3), the absolute error (y, x), and its mean over asked pixels."""
    image, answer = _stretched(row.image, row), _stretched(row.answer, row)
    masked = np.where(row.seen[..., None], image, HIDDEN)
    for cell in (image, masked, answer):
        cell[~row.valid] = INVALID
    error = np.where(row.asked, np.abs(row.answer - row.image).mean(axis=-1), np.nan)
    known = error[np.isfinite(error)]
    return [image, masked, answer], error, float(known.mean()) if known.size else 0.0


def draw(path: Path, rows: Sequence[Picture], *, title: str, dpi: int = DPI) -> Path:
    """Draw a panel as PNG. All places are settled here, in inches: layout engines take most of a panel's time.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [_cell_size(row) for row in rows]
    height = TOP + sum(size[0] + BELOW for size in sizes)
    figure = Figure(figsize=(WIDTH, height), dpi=dpi)
    FigureCanvasAgg(figure)
    figure.text(0.08 / WIDTH, 1 - 0.22 / height, title, fontsize=9.5, va="center")
    boxes: list[list[tuple[float, ...]]] = [[], [], []]
    top = TOP
    for number, (row, (tall, wide)) in enumerate(zip(rows, sizes, strict=True)):
        places = [(left + (CELL - wide) / 2, top, wide, tall) for left in COLUMNS.values()]
        axes = [_axes(figure, place) for place in places]
        _draw_row(figure, axes, row, places)
        for axis, name in zip(axes, COLUMNS, strict=True):
            if number == 0:
                axis.set_title(name, fontsize=8.5, pad=4)
        for box, place in zip(boxes, places, strict=False):
            box.append(place)
        top += tall + BELOW
    # No "Software" entry: a picture of the same model is the same file.
    about = {"Software": None, BOXES: " ".join(";".join(_pixels(cell, dpi) for cell in column) for column in boxes)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, format="png", metadata=about)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"the picture '{path.name}' cannot be written: {error.strerror or error}") from error
    return path


def _cell_size(row: Picture) -> tuple[float, float]:
    """Return (height, width) in inches of a cell in true proportion."""
    ratio = row.image.shape[0] / row.image.shape[1] * row.aspect
    wide = CELL * min(1.0, TALLEST / ratio)
    return wide * ratio, wide


def _axes(figure: Any, place: Sequence[float]) -> Any:
    """Add axes at (left, top, width, height) in inches from the upper left corner."""
    left, top, wide, tall = place
    width, height = figure.get_size_inches()
    axis = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    return axis


def _pixels(place: Sequence[float], dpi: int) -> str:
    """Return a cell's box in pixels as "left,top,right,bottom"."""
    left, top, wide, tall = place
    return ",".join(str(round(one * dpi)) for one in (left, top, left + wide, top + tall))


def _draw_row(figure: Any, axes: Sequence[Any], row: Picture, places: Sequence[tuple[float, ...]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shown, error, mean = _cells(row)
    for axis, picture in zip(axes, shown, strict=False):
        axis.imshow(picture, aspect="auto", interpolation="nearest")
    finite = error[np.isfinite(error)]
    limit = float(np.percentile(finite, ERROR_PERCENTILE)) if finite.size else 0.0
    drawn = axes[3].imshow(error, aspect="auto", cmap="magma", vmin=0, vmax=limit or 1.0, interpolation="nearest")
    _scale(figure, drawn, places[3], row.unit)
    if len(row.window.low) == 1:
        grey = ScalarMappable(Normalize(float(row.window.low[0]), float(row.window.high[0])), row.window.colours)
        _scale(figure, grey, places[2], row.unit)
    axes[0].set_ylabel(row.label, fontsize=7.5, labelpad=3)
    _fit(figure, axes[0].yaxis.label, places[0])
    axes[0].set_xlabel(row.window.name, fontsize=6.5, loc="left", labelpad=2)
    axes[3].set_xlabel(f"mean {mean:.3g} {row.unit}", fontsize=6.5, labelpad=2)
    _letters(axes[0], row.edges)


def _scale(figure: Any, drawn: Any, place: Sequence[float], unit: str) -> None:
    left, top, wide, tall = place
    bar = figure.colorbar(drawn, cax=_axes(figure, (left + wide + 0.06, top, 0.08, tall)))
    bar.ax.tick_params(labelsize=6, length=2, pad=1.5)
    bar.set_label(unit, fontsize=6.5, labelpad=2)
    _fit(figure, bar.ax.yaxis.label, place)
    bar.outline.set_visible(False)


def _fit(figure: Any, label: Any, place: Sequence[float]) -> None:
    """Keep an upright label next to a cell out of the rows above and below: two lines, then smaller letters."""
    room = (place[3] + BELOW - APART) * figure.dpi
    renderer = figure.canvas.get_renderer()
    if label.get_window_extent(renderer).height <= room:
        return
    label.set_text(label.get_text().replace(" · ", "\n", 1))
    if "\n" in label.get_text():
        label.set(fontsize=TWO_LINES, linespacing=1.0)
    # Hinted letters do not shrink in proportion: once more with what came of it.
    for _ in range(3):
        if (height := label.get_window_extent(renderer).height) > room:
            label.set_fontsize(label.get_fontsize() * room / height)


def _letters(axis: Any, edges: str) -> None:
    """Write the patient's sides at the middle of a plane's edges."""
    from matplotlib.patheffects import withStroke

    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for letter, (x, y, across, up) in zip(edges, places, strict=False):
        said = axis.text(x, y, letter, ha=across, va=up, fontsize=7, color="white", transform=axis.transAxes)
        said.set_path_effects([withStroke(linewidth=1.5, foreground="black")])


def caption(batch: Batch, mask_ratio: float, patch: Sequence[int]) -> str:
    """Return a panel's title: modality, what is shown, mask ratio, patch and spacing."""
    names = [batch.channels[index].name for group in shown_groups(batch.channels) for index in group]
    shown = f"{'/'.join(names)} of {len(batch.channels)} channels" if len(batch.channels) > 1 else names[0]
    parts = [
        Path(batch.modality).stem,
        shown,
        f"{mask_ratio:.0%} of patches hidden",
        f"patch {' x '.join(map(str, patch))}",
    ]
    if batch.spacing is not None:
        unit = "m" if batch.channels[0].kind in ("optical", "thermal", "sar", "elevation") else "mm"
        # Crops of several images: volumes of one batch seldom have one spacing.
        ends = zip(batch.spacing.amin(0).tolist(), batch.spacing.amax(0).tolist(), strict=True)
        spans = [[f"{value:.3g}" for value in pair] for pair in ends]
        spans = [low if low == high else f"{low} to {high}" for low, high in spans]
        parts.append(f"spacing {' x '.join(spans)} {unit}")
    return "  ·  ".join(parts)


def draw_reconstructions(
    objective: MaskedObjective,
    batch: Batch,
    path: Path,
    *,
    sides: Mapping[str, Letters] | None = None,
    rows: int = ROWS,
    dpi: int = DPI,
    note: str = "",
) -> dict[str, dict[str, Any]]:
    """Reconstruct a batch, draw some of its crops to `path`, and return the errors of all (see `error_summary`).

    The masks are those of the batch's own step number. `note` is put before the title.

    Raises:
        OutputError: the file cannot be written.
    """
    batch = batch.to(next(objective.mae.parameters()).device)
    made = objective.reconstruct(batch, batch.step)
    patch = objective.mae.spec.patch(made.image.ndim - 2)
    ratio = objective.masking.ratio_at((objective.seed, batch.step))
    # A crop gives one row or more; the first that do not fit any more are left out.
    shown = pictures(batch, made, most_structure(batch, made, patch, rows), sides)[:rows]
    title = "  ·  ".join(part for part in (note, caption(batch, ratio, patch)) if part)
    draw(path, shown, title=title, dpi=dpi)
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
