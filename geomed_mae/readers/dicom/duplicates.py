"""Copies: one SOP instance found twice, and the same pixels under a new instance UID at the same position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.file import UNDEFINED_LENGTH, open_dicom
from geomed_mae.readers.dicom.image_header import Header
from geomed_mae.readers.dicom.repeats import Slice
from geomed_mae.readers.reasons import Reason

MIN_PLACES = 3
"""An instance UID at so many places names no instance: de-identification has written one UID into many files."""

Refuse = Callable[[Header, Reason, str], None]


def without_copies(headers: Sequence[Header], refuse: Refuse) -> list[Header]:
    """Keep the first of each SOP instance; refuse same bytes as DUPLICATE, and a series with a conflict altogether.

    An instance UID that names nothing (see MIN_PLACES) is taken away, and conflicts with nothing.
    """
    instances: dict[str, list[Header]] = {}
    for header in headers:
        if header.sop_uid:
            instances.setdefault(header.sop_uid, []).append(header)
    copies: set[int] = set()
    nameless: set[int] = set()
    conflicts: set[tuple[str, ...]] = set()
    for same in instances.values():
        if len(same) == 1:
            continue
        first: dict[bytes, Header] = {}
        same_bytes = [header for header in same if first.setdefault(file_digest(header), header) is not header]
        if len({_place(header) for header in same}) >= MIN_PLACES:
            nameless.update(map(id, same))
        elif len(first) > 1:
            conflicts.update(header.series for header in same)
            continue
        for header in same_bytes:
            copies.add(id(header))
            refuse(header, Reason.DUPLICATE, "")
    kept = []
    for header in headers:
        if header.series in conflicts:
            refuse(header, Reason.DUP_CONFLICT, "in its series, one SOP instance has two contents")
        elif id(header) not in copies:
            kept.append(replace(header, sop_uid="") if id(header) in nameless else header)
    return kept


def _place(header: Header) -> tuple:
    """Return what differs between instances, and not between versions of one: series, number and position."""
    return header.series, header.instance, header.frames[0].position


def file_digest(header: Header) -> bytes:
    """Return the SHA-256 of a file's bytes."""
    try:
        with header.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        # A file that is gone equals no other one; reading it later says so.
        return str(header.path).encode("utf-8", "surrogateescape")


def pixel_copies(slices: Sequence[Slice], places: np.ndarray) -> list[Slice]:
    """Return the slices whose stored pixels, size and rescale are those of an earlier one at the same position.

    For the few that nothing else tells apart: it reads their pixel data.
    """
    met: set[tuple] = set()
    copies = []
    for one, place in zip(slices, places.tolist(), strict=True):
        key = (place, one.number, one.frame.slope, one.frame.intercept, _pixel_digest(one.header))
        if key in met:
            copies.append(one)
        met.add(key)
    return copies


def _pixel_digest(header: Header) -> bytes:
    try:
        opened = open_dicom(header.path)
        with opened.body() as file:
            file.seek(opened.pixel_start)
            size = opened.bytes_left if opened.pixel_length == UNDEFINED_LENGTH else opened.pixel_length
            return hashlib.sha256(file.read(size)).digest()
    except (OSError, ReadError):
        return str(header.path).encode("utf-8", "surrogateescape")
