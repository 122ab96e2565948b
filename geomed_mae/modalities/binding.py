"""Binding: how series of one study become the channels of one Image, as a modality file says.

    bind: {resample: none}                    series that share frame of reference and grid (T1, T2, FLAIR of one study)
    bind: {onto: CT, resample: linear}        the others too, interpolated linearly onto the grid of channel CT
    channels:
      - {name: T1, kind: mr, sequence: T1, series: "*t1*mprage*"}

A channel takes the series whose physics in the header has its name; with `series`, a shell pattern compared without
case with SeriesDescription and ProtocolName, it takes what matches instead and nothing else. Descriptions are free text
that may name a person: they are compared in memory and written nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from geomed_mae.errors import ConfigError, suggest

RESAMPLE = ("none", "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The parsed and checked form of `bind`.

    Attributes:
        onto: name of the channel whose grid the others are brought onto, "" when only equal grids are bound.
        resample: "none" or "linear".
        patterns: (channel name, shell pattern) pairs of the channels that choose their series by description.
    """

    onto: str = ""
    resample: str = "none"
    patterns: tuple[tuple[str, str], ...] = field(default=())

    def named(self, *texts: str) -> list[str]:
        """Return the channels whose pattern matches any of `texts`, case aside."""
        folded = [text.casefold() for text in texts if text]
        return [
            name for name, pattern in self.patterns if any(fnmatchcase(text, pattern.casefold()) for text in folded)
        ]


def parse_binding(data: Any, channels: Sequence[str], patterns: dict[str, str], place: str) -> Binding | None:
    """Check the field `bind` of a modality file.

    Args:
        data: its value as read, None when absent.
        channels: names of the modality's channels.
        patterns: the channels' `series` patterns by name.
        place: the file, for messages.

    Raises:
        ConfigError: with the file, the field and what is allowed there.
    """
    if data is None:
        if patterns:
            raise ConfigError(f"{place}: channel '{next(iter(patterns))}' has `series`, which needs a field `bind`")
        return None
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: bind is {data!r}; write a mapping, for example bind: {{resample: none}}")
    known = {entry.name for entry in fields(Binding)} - {"patterns"}
    for key in data:
        if key not in known:
            raise ConfigError(f"{place}: bind has no field '{key}'; {suggest(str(key), known)}")
    for name, pattern in patterns.items():
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{place}: series of channel '{name}' is {pattern!r}; write a pattern such as \"*t1*\"")
    onto, resample = data.get("onto", ""), data.get("resample", "none")
    if resample not in RESAMPLE:
        raise ConfigError(f"{place}: bind.resample is {resample!r}; known: {', '.join(RESAMPLE)}")
    if onto and onto not in channels:
        raise ConfigError(f"{place}: bind.onto is {onto!r}, no channel of this modality ({', '.join(channels)})")
    if bool(onto) != (resample == "linear"):
        raise ConfigError(f"{place}: bind.onto and bind.resample: linear go together; give both or neither")
    if len(channels) < 2:
        raise ConfigError(f"{place}: bind needs at least two channels to bind")
    return Binding(onto=onto, resample=resample, patterns=tuple(patterns.items()))
