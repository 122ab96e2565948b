"""The ledger: one line a file, so that nothing is skipped in silence.

Law of conservation: files found = used + skipped + unsupported. `Ledger` refuses to exist in any other state.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

from geomed_mae.archives.identity import keyed
from geomed_mae.errors import IntegrityError
from geomed_mae.readers.reasons import NOT_BAD, Reason, status
from geomed_mae.readers.regular import shown, without_quotes
from geomed_mae.readers.source import Refusal, Source


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


def account(
    found: Sequence[tuple[Path, Path]], kept: Mapping[str, Source], refusals: Sequence[Refusal], salt: bytes
) -> Ledger:
    """Give every file exactly one line.

    Args:
        found: each file as it was listed and as readers name it, with links resolved.
        kept: image key -> its Source.
        refusals: by either name; the first one of a file counts.
        salt: of the keyed hashes.
    """
    used: dict[Path, list[str]] = {}
    for key, source in kept.items():
        for path in dict.fromkeys(source.files):
            used.setdefault(path, []).append(key)
    refused: dict[Path, Refusal] = {}
    for refusal in refusals:
        refused.setdefault(refusal.path, refusal)
    names = {shown(path) for path, _ in found}
    entries = []
    for path, real in found:
        file = keyed(salt, "file", str(path))
        # What was said of a link itself (a repetition, a way out) stands before what was said of the file it leads to.
        refusal = refused.get(path) or refused.get(real)
        if real in used and (path == real or path not in refused):
            # One file may hold several images (time points, stacks): those that were refused are told here.
            detail = f"also refused: {refusal.reason.name}" if refusal else ""
            entries.append(Entry(file, "used", images=tuple(used[real]), detail=detail))
        elif refusal is None:
            # A reader outside this package may lose a file; the ledger does not.
            lost = "no reader says what became of it, which is a bug"
            entries.append(Entry(file, status(Reason.MALFORMED), Reason.MALFORMED.name, detail=lost))
        else:
            detail = _without_names(refusal.detail, names, path, real)
            entries.append(Entry(file, status(refusal.reason), refusal.reason.name, detail=detail))
    return Ledger(tuple(entries))


def _without_names(detail: str, names: Set[str], *paths: Path) -> str:
    """Return a detail without names of files, its own and (by words) others', and without what it quotes from them."""
    for path in paths:
        detail = detail.replace(str(path), "").replace(shown(path), "the file").replace(path.name, "the file")
    words = ("another file" if word.strip(",;:.") in names else word for word in without_quotes(detail).split(" "))
    return " ".join(words)
