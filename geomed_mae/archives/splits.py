"""Splits by group: no patient and no scene on both sides.

Slice-level splits inflate accuracy by 5 to 30 points (Tampu et al. 2022, s41597-022-01618-6), so there
is no other kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.errors import ConfigError


def split_by_group(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (training, held out), whole groups only, the same for the same groups and seed.

    At least one group is held out when `fraction` is above 0, and at least one is kept for training.

    Raises:
        ConfigError: there are too few groups to split.
    """
    # By order of appearance, which is that of the files, not by key: keys differ between scans of the same archive.
    groups = list(dict.fromkeys(row.group for row in rows))
    np.random.Generator(np.random.Philox(key=[seed, len(groups)])).shuffle(groups)
    if fraction == 0:
        return list(rows), []
    if len(groups) < 2:
        raise ConfigError(
            f"{len(rows)} labelled images of {len(groups)} patient or scene cannot be split; "
            "add images, set labels.block_px to split one raster scene by blocks, or set labels.validation to 0"
        )
    held = set(groups[: min(max(round(fraction * len(groups)), 1), len(groups) - 1)])
    return [row for row in rows if row.group not in held], [row for row in rows if row.group in held]
