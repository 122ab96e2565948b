"""Token grids to look at: their first three principal components as red, green and blue.

The components are those of all images of a modality together, so that a colour means the same in each of them. What is
alike for the encoder has a similar colour; the colours themselves mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geomed_mae.archives.views import View, axis_letters
from geomed_mae.image import Geometry, VolumeGeometry
from geomed_mae.writers import complete_file
from geomed_mae.writers.token_spool import TokenSpool

ENDING = "-preview.png"
COMPONENTS = 3
MAX_TOKENS = 65_536
"""Tokens of one image that have a say in the components."""
STRETCH = (2.0, 98.0)
"""Percentiles of a component that become the darkest and the brightest."""
NOTHING = 0
"""Value of a colour where there is no token; the others are 1 to 255."""
SIDE = 1024
"""Longest side of a picture in pixels."""
PLANE_SIDE = 384
"""Longest side of one of a volume's three planes."""
LARGEST = 16
"""Pixels of a picture that a token takes at most along an axis."""
GAP = 6


class Colours:
    """Three directions in the space of tokens, and what of them is dark and bright."""

    def __init__(self, spools: Sequence[TokenSpool]) -> None:
        """Find them in the tokens of some images, at least one."""
        width = spools[0].width
        count, total, products = 0, np.zeros(width), np.zeros((width, width))
        # Tokens lie around a mean that is large beside their spread: products are taken around the first one.
        base = None
        for spool in spools:
            for part in spool.sample(MAX_TOKENS):
                if not len(part):
                    continue
                base = part[0].astype(np.float64) if base is None else base
                exact = part - base
                count, total, products = count + len(exact), total + exact.sum(axis=0), products + exact.T @ exact
        mean = total / max(count, 1)
        _, vectors = np.linalg.eigh(products / max(count, 1) - np.outer(mean, mean))
        directions = vectors[:, ::-1][:, :COMPONENTS].T
        # An eigenvector has no sign of its own: the entry that is largest decides, so that runs agree.
        signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])
        self._directions = directions * signs[:, None]
        self._mean = mean + (0 if base is None else base)
        seen = [self._projected(part) for spool in spools for part in spool.sample(MAX_TOKENS)]
        self._low, self._high = np.percentile(np.concatenate(seen), STRETCH, axis=0)

    def _projected(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens - self._mean) @ self._directions.T

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Return the colours of tokens (width, *grid): uint8 (3, *grid), NOTHING where there is no token."""
        known = np.isfinite(tokens[0])
        span = np.where(self._high > self._low, self._high - self._low, 1.0)
        shares = (self._projected(tokens[:, known].T) - self._low) / span
        found = np.full((COMPONENTS, *tokens.shape[1:]), NOTHING, dtype=np.uint8)
        found[: shares.shape[1], known] = (1 + np.clip(shares, 0, 1) * 254).round().astype(np.uint8).T
        return found

    def picture(self, spool: TokenSpool) -> np.ndarray:
        """Return the colours of a whole image: uint8 (3, *grid)."""
        whole = np.full((COMPONENTS, *spool.grid), NOTHING, dtype=np.uint8)
        for first, band in spool.bands():
            whole[:, first : first + band.shape[1]] = self.of(band)
        return whole


def write(path: Path, colours: np.ndarray, geometry: Geometry) -> Path:
    """Write colours as PNG in true proportion: a raster or plane as it lies, of a volume three planes side by side.

    A volume is cut through the middle of its tokens: axial, coronal and sagittal, in the radiological convention.

    Args:
        path: file to write.
        colours: uint8 (3, *grid), NOTHING where there is no token.
        geometry: of the tokens.

    Raises:
        OutputError: the file cannot be written.
    """
    from PIL import Image as Pillow

    if isinstance(geometry, VolumeGeometry):
        planes = _planes(colours, geometry)
    else:
        spacing = geometry.spacing or (1.0, 1.0)
        planes = [(colours, tuple(size * step for size, step in zip(colours.shape[1:], spacing, strict=True)))]
    most = PLANE_SIDE if len(planes) > 1 else SIDE
    # One scale for all planes.
    scale = min(most, LARGEST * max(colours.shape[1:])) / max(max(size) for _, size in planes)
    pictures = [_view(plane, size).picture(max(1, round(scale * max(size)))) for plane, size in planes]
    width = sum(picture.width + GAP for picture in pictures) - GAP
    sheet = Pillow.new("RGB", (width, max(picture.height for picture in pictures)), (255, 255, 255))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    with complete_file(path) as final:
        sheet.save(final, format="PNG")
    return path


def _view(colours: np.ndarray, size: tuple[float, float]) -> View:
    """A plane to draw; of a very large one every so many tokens, which is all that a picture can show."""
    step = max(1, max(colours.shape[1:]) // (2 * SIDE))
    some = np.moveaxis(colours[:, ::step, ::step], 0, -1)
    # White, because any colour may be that of a token, the one of what is not valid elsewhere too.
    shown = np.where((some != NOTHING).any(axis=-1, keepdims=True), some, 255).astype(np.float32) / 255
    return View(shown, np.ones(shown.shape[:2], dtype=bool), ((0.0, 1.0),) * COMPONENTS, size)


def _planes(colours: np.ndarray, geometry: VolumeGeometry) -> list[tuple[np.ndarray, tuple[float, float]]]:
    """Cut a volume axially, coronally and sagittally; return each plane with its (height, width) in mm."""
    letters, lengths = axis_letters(geometry.affine), np.array(colours.shape[1:]) * geometry.spacing
    # From superior down, from anterior back, from the patient's right to the left, as radiologists look at it.
    order = [next(n for n, pair in enumerate(letters) if set(pair) == set(wanted)) for wanted in ("SI", "AP", "RL")]
    turned = tuple(
        slice(None, None, None if letters[n] == wanted else -1)
        for n, wanted in zip(order, ("SI", "AP", "RL"), strict=True)
    )
    volume = colours.transpose(0, *(n + 1 for n in order))[(slice(None), *turned)]
    high, deep, wide = (float(lengths[n]) for n in order)
    known = (volume != NOTHING).any(axis=0)
    at = [_middle(known.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    cuts = [
        (volume[:, at[0]], (deep, wide)),
        (volume[:, :, at[1]], (high, wide)),
        (volume[:, :, :, at[2]], (high, deep)),
    ]
    return [(np.ascontiguousarray(plane), size) for plane, size in cuts]


def _middle(occupied: np.ndarray) -> int:
    places = np.flatnonzero(occupied)
    return int(places[0] + places[-1]) // 2 if places.size else len(occupied) // 2
