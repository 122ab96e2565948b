"""No score over images that a model has seen: what is compared before anything is scored.

Slice-level splits inflate accuracy by 5 to 30 points (Tampu et al. 2022, s41597-022-01618-6); an encoder that was
pretrained on the test images is the same fault one step earlier. Compared are, by `seen.Seen`:

    pixels    the same pixel arrays, whatever files and UIDs are called
    patient   patient, study, series, frame of reference, or a group of the index; also through a third image that has
              two patient numbers, and also between archives that were scanned apart
    looks     near duplicates: re-encoded, rescaled, brightened copies (`duplicates`)
    ground    rasters that overlap, or lie within a buffer (`neighbours`)

What a model has learned labels of is never scored (exit 6). Images that it has seen without labels in pretraining are
refused too, unless that is allowed with --transductive; the score then says so. Not recognised where neither
coordinates nor identifiers tell: crops, flips and rotations, slices of a volume, the same pixels beside other channels
(CT alone, and bound to PET), and the same volume as DICOM and as NIfTI with other array axes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomed_mae.archives.duplicates import near_duplicates
from geomed_mae.archives.neighbours import look_alike, on_shared_ground
from geomed_mae.archives.places import overlapping
from geomed_mae.archives.seen import PRETRAINING, TRAINING, Pairs, Part, Seen, group_key, hashed, kin, spot_of
from geomed_mae.errors import LeakageError

if TYPE_CHECKING:
    from geomed_mae.archives.index import Index, Row

PIXELS, PATIENT, LOOKS, GROUND = "same pixels", "same patient or study", "near duplicates", "shared ground"

SHOWN = 5
"""Keys of images that an error names."""

Matches = dict[str, set[str]]
"""Kind -> keys of the images that match."""

log = logging.getLogger(__name__)


def check_parts(
    index: Index,
    test: Sequence[Row],
    train: Sequence[Row],
    validation: Sequence[Row] = (),
    *,
    seen: Seen | None,
    unit: str = "group",
    buffer_m: float = 0.0,
    transductive: bool = False,
) -> dict[str, Any]:
    """Make sure that the parts of a task have nothing in common, and that the encoder has not seen the test part.

    Args:
        index: all images at hand; those in no part may show that two others belong together.
        test: images that are scored at the end.
        train: images whose labels are learned.
        validation: images that decide when to stop.
        seen: what the encoder has seen; None where nothing is recorded of it.
        unit: "block" where the same images are in several parts, by blocks of pixels.
        buffer_m: rasters of different parts, and of the test part and of pretraining, are further apart than this.
        transductive: the encoder may have seen test images without labels.

    Returns:
        for the summary: `leakage`, and with `transductive` how many test images the encoder knows.

    Raises:
        LeakageError: with kinds, number and keys of the images.
    """
    relatives = kin(index)
    sides = ((test, [*train, *validation], "test"), (validation, train, "validation"))
    if unit == "block":
        rows = {row.key: row for row in (*test, *train, *validation)}
        _refuse_between_blocks(index, list(rows.values()))
    else:
        for rows, others, name in sides:
            if not rows or not others:
                continue
            part = Seen.of(index, others, what=TRAINING, relatives=relatives).parts[0]
            found = _matches(index, rows, part, relatives=relatives, buffer_m=buffer_m)
            _refuse(
                found,
                rows,
                f"{name} images belong with images of another part",
                "keep them on one side: scan all archives into one INDEX with --split group or --split block (buffer), "
                "which ties together what belongs together",
            )
    record = _check_scored(index, test, seen, relatives, buffer_m=buffer_m, transductive=transductive)
    record["leakage"]["compared_with"][TRAINING] = len(train) + len(validation)
    return record


def check_scored(
    index: Index, rows: Sequence[Row], seen: Seen | None, *, buffer_m: float = 0.0, transductive: bool = False
) -> dict[str, Any]:
    """Make sure that a model has not seen images that it is going to be scored on.

    Args:
        index: holds `rows`, and what else is at hand.
        rows: images to be scored.
        seen: what the model has seen; None where nothing is recorded of it.
        buffer_m: rasters are to be further apart than this from those that it has seen.
        transductive: it may have seen them in pretraining, without labels.

    Returns:
        as `check_parts`.

    Raises:
        LeakageError: as `check_parts`.
    """
    private = seen is not None and any(part.private is not None for part in seen.parts)
    relatives = kin(index) if private else {}
    return _check_scored(index, rows, seen, relatives, buffer_m=buffer_m, transductive=transductive)


def _check_scored(
    index: Index,
    rows: Sequence[Row],
    seen: Seen | None,
    relatives: Mapping[str, Pairs],
    *,
    buffer_m: float,
    transductive: bool,
) -> dict[str, Any]:
    seen = Seen.unknown() if seen is None else seen
    found: dict[str, Matches] = {TRAINING: {}, PRETRAINING: {}}
    for part in seen.parts:
        for kind, keys in _matches(index, rows, part, relatives=relatives, buffer_m=buffer_m).items():
            found[part.what].setdefault(kind, set()).update(keys)
    _refuse(
        found[TRAINING],
        rows,
        "labelled images were trained on, wholly or in part, or belong with images that were",
        "evaluate on others (the scores of the run's own test part are in its summary.json)",
    )
    if not transductive:
        _refuse(
            found[PRETRAINING],
            rows,
            "test images were pretrained on, or belong with images that were",
            "scan once with --split group, pretrain on the part train of that INDEX (--set data.split=train) and use "
            "it here too; or allow it with --transductive (no labels were seen), which is recorded with the score",
        )
    known = set().union(*found[PRETRAINING].values()) if found[PRETRAINING] else set()
    kinds = {kind: len(keys) for kind, keys in found[PRETRAINING].items()}
    allowed = {"allowed": True, "test_images_pretrained_on": len(known), "kinds": kinds}
    return {
        "leakage": {"test_images": len(rows), "buffer_m": buffer_m, **_coverage(seen)},
        **({"transductive": allowed} if transductive else {}),
    }


def _coverage(seen: Seen) -> dict[str, Any]:
    """Return with how many images of which training was compared, and what could not be; warn of the latter."""
    compared = {what: sum(part.images for part in seen.parts if part.what == what) for what in (TRAINING, PRETRAINING)}
    unknown = [f"{what}: nothing is recorded" for what in seen.unrecorded]
    unknown += [f"{part.what}: {name}" for part in seen.parts for name in part.missing]
    unknown = list(dict.fromkeys(unknown))
    if seen.unrecorded:
        log.warning(
            "nothing is recorded of the images that the encoder was pretrained on: whether test images are among them "
            "is unknown, and the score says so"
        )
    elif unknown:
        log.warning(
            "the private part of what the model has seen (RUN/private) is not at hand: patients and look-alikes were "
            "not compared with it, and the score says so"
        )
    return {"compared_with": compared, "not_compared": unknown}


def _matches(
    index: Index,
    rows: Sequence[Row],
    part: Part,
    *,
    relatives: Mapping[str, Pairs],
    buffer_m: float,
) -> Matches:
    """Return which of `rows` match what a part has, by kind; kinds without a match are left out."""
    salt = bytes.fromhex(part.salt)
    found: Matches = {
        PIXELS: {row.key for row in rows if index.content_key(row.key, salt) in part.contents},
        PATIENT: set(),
        LOOKS: set(),
        GROUND: set(),
    }
    names = {row.group for row in rows if row.footprint is None} if part.groups else set()
    known = {name for name in names if group_key(salt, name) in part.groups}
    found[PATIENT] |= {row.key for row in rows if row.footprint is None and row.group in known}
    if part.private is not None:
        pairs = sorted({pair for row in rows for pair in relatives[row.key]})
        theirs = part.private.identities
        shared = {pair for pair, text in zip(pairs, hashed(part.private.salt, pairs), strict=True) if text in theirs}
        found[PATIENT] |= {row.key for row in rows if shared and not shared.isdisjoint(relatives[row.key])}
        looks = index.looks
        alike = look_alike([looks[row.key] for row in rows], part.private.looks)
        found[LOOKS] = {row.key for row, hit in zip(rows, alike, strict=True) if hit} - found[PIXELS]
    placed = [(row.key, spot) for row in rows if (spot := spot_of(row)) is not None]
    if placed and part.places:
        near = on_shared_ground([spot for _, spot in placed], part.places, buffer_m)
        found[GROUND] = {key for (key, _), hit in zip(placed, near, strict=True) if hit}
    return {kind: keys for kind, keys in found.items() if keys}


def _refuse_between_blocks(index: Index, rows: Sequence[Row]) -> None:
    """Refuse images that show the same and are cut into blocks differently: a block of one is in a part, and what it
    shows is in another part of the other. On one and the same grid blocks coincide.
    """
    spots = [spot_of(row) for row in rows]
    grids = [(spot, row.shape) for spot, row in zip(spots, rows, strict=True)]
    hashes = index.looks
    looks = near_duplicates([hashes[row.key] for row in rows])
    places = overlapping([spot and spot[0] for spot in spots], [spot and spot[1] for spot in spots])
    found: Matches = {}
    for kind, numbers in ((LOOKS, looks), (GROUND, places)):
        together: dict[int, list[int]] = {}
        for at, number in enumerate(numbers):
            if number is not None:
                together.setdefault(number, []).append(at)
        for members in together.values():
            if len({grids[at] for at in members}) > 1:
                found.setdefault(kind, set()).update(rows[at].key for at in members)
    _refuse(
        found,
        rows,
        "images show the same on different grids, so that blocks (labels.block_px) do not keep training and test apart",
        "give one of them, or split by image: leave labels.block_px out",
    )


def _refuse(found: Matches, rows: Sequence[Row], what: str, way_out: str) -> None:
    """Raise for the images found, if there are any."""
    if not found:
        return
    hits = set().union(*found.values())
    keys = tuple(row.key for row in rows if row.key in hits)
    kinds = {kind: len(members) for kind, members in found.items()}
    said = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    more = "" if len(keys) <= SHOWN else f" and {len(keys) - SHOWN} more"
    raise LeakageError(
        f"{len(keys)} of the {len(rows)} {what} ({said}): {', '.join(keys[:SHOWN])}{more}. A score over them would say "
        f"nothing about new images; {way_out}",
        kinds=kinds,
        count=len(keys),
        keys=keys[:SHOWN],
    )


@contextlib.contextmanager
def no_scores_over_leaks(*files: Path) -> Iterator[None]:
    """Let no older score stand where one has been refused: on a LeakageError `files` are deleted before it goes on.

    Whoever asks for a score at a path gets either that score or no file there, and cannot take an older one for it.
    Other errors leave the files as they are: they say nothing against what was scored before.
    """
    try:
        yield
    except LeakageError:
        for file in files:
            file.unlink(missing_ok=True)
        raise
