"""Which label files could belong to which images, before any label is read.

In the order of their weight: a label file names an image's SOP instances, or its series; its stem is that of exactly
one image; it lies in the image's frame of reference; or nothing but its coordinates can tell. An image goes with the
files of the weightiest kind alone: of three structure sets in one frame of reference, each belongs to the series that
it was drawn on. Array shapes decide nothing.

Labels may lie among the images. A file that is an image of the index is no label file, unless its name says whose
labels it holds: `scan_mask.nii.gz` beside `scan.nii.gz`, or `labels/scan.nii.gz`; then it is no image.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ReadError
from geomed_mae.readers import label_references
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import list_files

COMPRESSED = (".gz",)
"""Endings that are taken off before the stem: scan.nii.gz has the stem "scan"."""

AFFIX = re.compile(r"[ ._-](?:gt|labels?|labelmap|masks?|rois?|seg|segmentation)$", re.IGNORECASE)
"""What names of label files add to the image's: scan_mask, scan-label, scan.seg."""

CHANNEL = re.compile(r"_0000$")
"""What nnU-Net adds to the image's name, for its first channel."""

NOT_LABELS = frozenset(
    reason.name
    for reason in (
        Reason.UNKNOWN_FORMAT,
        Reason.NOT_REGULAR,
        Reason.EMPTY,
        Reason.BAND_MISMATCH,
        Reason.DTYPE_UNSUPPORTED,
        Reason.NON_IMAGE,
    )
)
"""Reasons for which a file beside the labels is no label map at all: a README, a style file, an image."""


class Tie(IntEnum):
    """What ties a label file to an image; more is weightier."""

    PLACE = 1
    FRAME = 2
    NAME = 3
    SERIES = 4
    INSTANCE = 5


REFERENCES = {Tie.INSTANCE: "instance", Tie.SERIES: "series", Tie.FRAME: "frame"}
"""Kinds of `Source.identity` that label files refer to, by weight."""


@dataclass(frozen=True, slots=True)
class LabelFile:
    """A file that may hold labels, and the (kind, value) pairs of the images that it names."""

    path: Path
    references: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Pairs:
    """The outcome: rows that are images, files to read and for which rows, and the files that are not read for any.

    Attributes:
        rows: images, those rows left out that are labels themselves.
        ties: per file, the kind of tie and the rows to read it for, in the index's order.
        elsewhere: how many label files name other images.
        other: how many files are no label files.
    """

    rows: list[Row]
    ties: dict[LabelFile, tuple[Tie, list[Row]]] = field(default_factory=dict)
    elsewhere: int = 0
    other: int = 0


def stem_of(paths: Sequence[Path]) -> str:
    """Return the name by which an image's files are matched: the file's stem, or the folder's name of a series."""
    if len(paths) > 1:
        return paths[0].parent.name
    name = paths[0]
    return (name.with_suffix("") if name.suffix.lower() in COMPRESSED else name).stem


def pair(index: Index, labels: Path) -> Pairs:
    """Pair the files in `labels` (a file or a folder, searched through recursively) with the images of an index.

    Raises:
        ConfigError: there is nothing at `labels`.
        ReadError: a label file is damaged.
    """
    # Sources know the files that links lead to; a label file goes by the name that it has here.
    paths = {path: Path(os.path.realpath(path)) for path in list_files(labels)}
    disguised = _labels_among_images(index, set(paths.values()))
    images = {path for row in index.rows for path in index.paths(row.key)} - set(disguised)
    candidates = [path for path, real in paths.items() if real not in images]
    hidden = set(disguised.values())
    pairs = Pairs([row for row in index.rows if row.key not in hidden])
    # Where images lie about, a damaged file without a label's name is as likely one of them, which the ledger counts.
    files = _label_files(candidates, among_images=len(candidates) < len(paths))
    pairs.other = len(paths) - len(files)
    ties = _ties(index, pairs.rows, files)
    best: dict[str, Tie] = {}
    for tie, rows in ties.values():
        for row in rows:
            best[row.key] = max(best.get(row.key, tie), tie)
    for file, (tie, rows) in ties.items():
        if kept := [row for row in rows if best[row.key] == tie]:
            pairs.ties[file] = (tie, kept)
        else:
            pairs.elsewhere += 1
    free = [row for row in pairs.rows if row.key not in best]
    for file in files:
        if file not in ties and file.references:
            # It names images that are not here; only images that do not say who they are could still be meant.
            nameless = [row for row in free if not any(kind == "frame" for kind, _ in index.identity(row.key))]
            pairs.elsewhere += not nameless
            if nameless:
                pairs.ties[file] = (Tie.PLACE, nameless)
        elif file not in ties:
            pairs.ties[file] = (Tie.PLACE, free)
    return pairs


def _label_files(candidates: Sequence[Path], *, among_images: bool) -> list[LabelFile]:
    found = []
    for path in candidates:
        try:
            references = label_references(path)
        except ReadError as error:
            if error.reason in NOT_LABELS or among_images:
                continue
            raise
        if references is not None:
            found.append(LabelFile(path, references))
    return found


def _labels_among_images(index: Index, paths: set[Path]) -> dict[Path, str]:
    """Return path -> row key of the label files that were indexed as images, told by their names."""
    single = {index.paths(row.key)[0]: row.key for row in index.rows if len(index.paths(row.key)) == 1}
    outside = {_plain(stem_of(files)) for row in index.rows if not set(files := index.paths(row.key)) <= paths}
    beside = {(path.parent, _plain(stem_of([path]))) for path in single if not AFFIX.search(stem_of([path]))}
    found = {}
    for path in single.keys() & paths:
        stem = stem_of([path])
        short = AFFIX.sub("", stem)
        if stem in outside or short in outside or (short != stem and (path.parent, short) in beside):
            try:
                if label_references(path) is not None:
                    found[path] = single[path]
            except ReadError:
                continue
    return found


def _plain(stem: str) -> str:
    return CHANNEL.sub("", stem)


def _ties(index: Index, rows: Sequence[Row], files: Sequence[LabelFile]) -> dict[LabelFile, tuple[Tie, list[Row]]]:
    """Return the weightiest tie of each file that has one, and the rows it ties it to."""
    known: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        for named in set(index.identity(row.key)):
            known[named].append(row)
    by_name = _by_name(index, rows, files)
    order = {row.key: number for number, row in enumerate(rows)}
    ties: dict[LabelFile, tuple[Tie, list[Row]]] = {}
    for file in files:
        for tie in sorted(Tie, reverse=True):
            if tie is Tie.NAME:
                tied = by_name.get(file, [])
            else:
                kind = REFERENCES.get(tie)
                tied = [row for named in file.references if named[0] == kind for row in known.get(named, ())]
            if tied:
                unique = {row.key: row for row in tied}
                ties[file] = (tie, sorted(unique.values(), key=lambda row: order[row.key]))
                break
    return ties


def _by_name(index: Index, rows: Sequence[Row], files: Sequence[LabelFile]) -> dict[LabelFile, list[Row]]:
    """Return the files whose stem is that of exactly one image, or of all images in one file (the volumes of a 4D NIfTI
    file): as it stands, or else without what labels add.
    """
    found: dict[LabelFile, list[Row]] = {}
    taken: set[str] = set()
    for plain in (False, True):
        named: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if row.key not in taken:
                stem = stem_of(index.paths(row.key))
                named[_plain(stem) if plain else stem].append(row)
        stems = {file: stem_of([file.path]) for file in files if file not in found}
        if plain:
            stems = {file: AFFIX.sub("", stem) for file, stem in stems.items()}
        times = Counter(stems.values())
        for file, stem in stems.items():
            if times[stem] == 1 and len({index.paths(row.key) for row in named.get(stem, ())}) == 1:
                found[file] = named[stem]
                taken.update(row.key for row in named[stem])
    return found
