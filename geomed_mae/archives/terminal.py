"""Pictures for a terminal without colour: one of five shades a character."""

from __future__ import annotations

import numpy as np

from geomed_mae.archives.views import View

SHADES = " ░▒▓█"
"""From dark to light on a dark terminal."""

NOTHING = "·"
"""A character that stands for no valid value."""

CELL_ASPECT = 2.0
"""Height over width of a character in nearly every terminal font."""

MAX_LINES = 44

EQUALISED = 0.3
"""Weight of a pixel's rank beside its brightness. Five shades show more when they are all used; at a weight of one
half the noise of an empty background begins to show."""


def terminal_picture(view: View, columns: int = 76) -> list[str]:
    """Return lines of at most `columns` characters that show a view in true proportion."""
    height, width = view.size
    lines = columns * height / (width * CELL_ASPECT)
    shrink = min(1.0, MAX_LINES / lines)
    brightness, valid = view.grey(max(1, round(lines * shrink)), max(1, round(columns * shrink)))
    shades = np.zeros(brightness.shape, dtype=int)
    if valid.any():
        known = brightness[valid]
        levels, places = np.unique(known, return_inverse=True)
        mixed = (1 - EQUALISED) * known + EQUALISED * places / max(len(levels) - 1, 1)
        span = max(float(np.ptp(mixed)), 1e-9)
        shades[valid] = np.minimum((mixed - mixed.min()) / span * len(SHADES), len(SHADES) - 1).astype(int)
    return [
        "".join(SHADES[shade] if inside else NOTHING for shade, inside in zip(line, row, strict=True))
        for line, row in zip(shades, valid, strict=True)
    ]
