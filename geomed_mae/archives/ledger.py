"""The ledger: one line a file, so that nothing is skipped in silence.

Law of conservation: files found = used + skipped + unsupported. `Ledger` refuses to exist in any other state.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from geomed_mae.errors import IntegrityError
from geomed_mae.readers.reasons import NOT_BAD, Reason, status


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one file.

    Attributes:
        file: keyed hash of the path; the path itself is in the private locations table.
        status: "used", "skipped" or "unsupported".
        reason: name of a Reason, or "" when used.
        images: keys of the images that the file is part of.
        detail: what was found, without identifiers or paths; for a used file, which of its images were refused.
    """

    file: str
    status: str
    reason: str = ""
    images: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ledger:
    """All files of an archive."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for entry in self.entries:
            expected = status(Reason[entry.reason]) if entry.reason else "used"
            if entry.status != expected or (entry.status == "used") != bool(entry.images):
                raise IntegrityError(f"ledger line {entry} contradicts itself")

    @property
    def counts(self) -> dict[str, int]:
        """Number of files by status."""
        counts = Counter(entry.status for entry in self.entries)
        return {"files": len(self.entries), **{name: counts[name] for name in ("used", "skipped", "unsupported")}}

    @property
    def reasons(self) -> dict[str, int]:
        """Number of files by reason, most frequent first."""
        return dict(Counter(entry.reason for entry in self.entries if entry.reason).most_common())

    @property
    def bad(self) -> int:
        """Number of files that count against the error budget: broken ones, not those that are no images."""
        return sum(1 for entry in self.entries if entry.reason and Reason[entry.reason] not in NOT_BAD)

    @property
    def bad_fraction(self) -> float:
        """Share of bad files among those that are used or bad: what `--max-bad` limits."""
        return self.bad / max(self.bad + self.counts["used"], 1)

    def summary(self) -> str:
        """Return one sentence that accounts for every file."""
        counts = self.counts
        reasons = ", ".join(f"{count} x {name}" for name, count in self.reasons.items())
        return (
            f"{counts['files']} files = {counts['used']} used + {counts['skipped']} skipped "
            f"+ {counts['unsupported']} unsupported{f' ({reasons})' if reasons else ''}"
        )

    def save(self, path: Path) -> None:
        """Write one JSON line a file."""
        with path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(asdict(entry)) + "\n" for entry in self.entries)

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read what `save` wrote."""
        lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
        records = (json.loads(line) for line in lines)
        return cls(tuple(Entry(**{**record, "images": tuple(record["images"])}) for record in records))
