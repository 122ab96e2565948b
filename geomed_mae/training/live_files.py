"""Files of live panels: how they are called, which of them are kept. Without torch: a report reads them too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from geomed_mae.errors import OutputError

BOXES = "geomed-mae boxes"
"""Text entry of a panel's PNG: cells of the first three columns as "left,top,right,bottom" in pixels, cells of a column
with semicolons and columns with blanks between them; a report cuts its series out of them."""

LIVE_KEPT = 8
"""Live panels kept of each kind: the first, the newest, and between them those nearest to equal ratios of steps."""


def live_name(done: int) -> str:
    """Return what the file name of a live panel begins with."""
    return f"step-{done:08d}"


def live_panels(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the live panels of a run: "01-ct" -> step -> file, steps rising."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("step-*-*.png")):
        _, step, name = path.stem.split("-", 2)
        if step.isdecimal():
            found.setdefault(name, {})[int(step)] = path
    return found


def chosen(steps: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of rising steps: the first, the last, and a series between them of about equal ratios.

    Dropping one step at a time gives the same series whether it grew in one session or in several.
    """
    kept = list(steps)
    while len(kept) > max(most, 2):
        gaps = [math.log(max(kept[n + 1], 1) / max(kept[n - 1], 1)) for n in range(1, len(kept) - 1)]
        del kept[1 + int(min(range(len(gaps)), key=gaps.__getitem__))]
    return kept


def thin_out(folder: Path, most: int = LIVE_KEPT) -> None:
    """Delete live panels but the chosen ones (see LIVE_KEPT).

    Raises:
        OutputError: they cannot be deleted.
    """
    for series in live_panels(folder).values():
        kept = set(chosen(list(series), most))
        _delete([path for step, path in series.items() if step not in kept])


def forget_after(folder: Path, done: int) -> None:
    """Delete live panels of steps after `done`, which are going to be done again.

    Raises:
        OutputError: they cannot be deleted.
    """
    for series in live_panels(folder).values():
        _delete([path for step, path in series.items() if step > done])


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"the picture '{path.name}' cannot be deleted: {error.strerror or error}") from error
