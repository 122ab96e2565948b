"""What a class is called in coded terminologies: the meaning of a segment in DICOM SEG (PS3.3 C.8.20.4.3, PS3.16).

A recipe's `head.codes` says it best. Where it does not, a class name that is the name of a SNOMED CT concept of the
standard's own lists of segment types ("liver", "left kidney", "edema", "neoplasm") gets that concept; any other name
gets a code of our own in a private scheme, which other software shows by its meaning, the class name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from geomed_mae.errors import MissingExtraError

PRIVATE_SCHEME = "99GEOMEDMAE"
"""Private schemes begin with 99 (PS3.16 section 8)."""
PRIVATE_CATEGORY = "tissue"
"""Category of a name that no list knows: the widest one."""
TYPE_LISTS = {
    "morphologically abnormal structure": "cid7194",
    "anatomical structure": "cid7192",
    "tissue": "cid7191",
    "body substance": "cid7197",
    "physical object": "cid7193",
    "substance": "cid7198",
}
"""Category -> context group of its types (PS3.16, CID 7150 to 7199)."""
OTHER_WORDS = {
    "gall bladder": "gallbladder",
    "haemorrhage": "hemorrhage",
    "oedema": "edema",
    "oesophagus": "esophagus",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "urinary bladder": "bladder",
}
"""What data sets call otherwise than the lists."""
NO_FINDING = frozenset({"background", "normal"})
"""Names in the lists that are no structure: they stay names."""
SCHEMES = ("SCT", "NCIt", "FMA")
"""Terminologies of which a name may be taken: SNOMED CT and those that the lists borrow from."""
SIDES = ("left", "right")
LONGEST_VALUE, LONGEST_MEANING = 16, 64
"""Characters of a code value (VR SH) and of a code meaning (VR LO)."""
BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept: value, scheme, meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class SegmentMeaning:
    """What a segment is: its class, kind of thing (category), thing (type), and the side of the body where known."""

    name: str
    category: Code
    type: Code
    side: Code | None = None


def segment_numbers(classes: Sequence[str]) -> tuple[int, ...]:
    """Return the class numbers that become segments: all but a class of the name "background"."""
    return tuple(number for number, name in enumerate(classes) if name.strip().casefold() != BACKGROUND)


def segment_meaning(name: str, codes: Mapping[str, Mapping[str, str]] | None) -> SegmentMeaning:
    """Return the coded meaning of a class.

    Args:
        name: of the class.
        codes: as in a recipe's `head.codes`.

    Raises:
        MissingExtraError: pydicom, whose dictionary holds the standard's lists, is not installed.
    """
    if given := (codes or {}).get(name):
        category = given.get("category", PRIVATE_CATEGORY)
        return SegmentMeaning(name, _category(category), Code(given["value"], given["scheme"], given["meaning"]))
    words = [word for word in re.split(r"[\s_\-]+", name.lower()) if word]
    found = _concept(" ".join(words))
    if found is not None:
        return SegmentMeaning(name, *found)
    side = next((word for word in SIDES if words.count(word) == 1), None)
    if side is not None:
        found = _concept(" ".join(word for word in words if word != side))
        if found is not None:
            return SegmentMeaning(name, *found, _of(_dictionary().cid244, side.capitalize()))
    meaning = re.sub(r"[\\\x00-\x1f]", " ", name).strip()[:LONGEST_MEANING]
    return SegmentMeaning(name, _category(PRIVATE_CATEGORY), Code(private_value(name), PRIVATE_SCHEME, meaning))


def private_value(name: str) -> str:
    """Return a class's code value in our scheme: the name itself where it is one, else a hash that follows from it."""
    value = name.upper()
    if re.fullmatch(r"[A-Z0-9_-]{1,16}", value):
        return value
    return hashlib.sha256(name.encode()).hexdigest()[:LONGEST_VALUE].upper()


def _concept(name: str) -> tuple[Code, Code] | None:
    """Return (category, type) of a concept of the standard's lists by its name."""
    found = _names().get(OTHER_WORDS.get(name, name))
    return None if found is None else (_category(found[0]), found[1])


@lru_cache(maxsize=1)
def _names() -> dict[str, tuple[str, Code]]:
    """Return the concepts of TYPE_LISTS by their names in small letters; the first list that has one decides."""
    names: dict[str, tuple[str, Code]] = {}
    for category, group in TYPE_LISTS.items():
        concepts = getattr(_dictionary(), group)
        for keyword in concepts.dir():
            code = _of(concepts, keyword)
            if code.scheme in SCHEMES and code.meaning.lower() not in NO_FINDING:
                names.setdefault(code.meaning.lower(), (category, code))
    return names


def _category(name: str) -> Code:
    """Return an entry of CID 7150, the categories of segments."""
    return _of(_dictionary().cid7150, "".join(word.capitalize() for word in name.split()))


def _of(concepts: Any, keyword: str) -> Code:
    found = getattr(concepts, keyword)
    return Code(found.value, found.scheme_designator, found.meaning)


def _dictionary() -> Any:
    try:
        from pydicom.sr.codedict import codes
    except ImportError:
        raise MissingExtraError("writing DICOM SEG", "pydicom", "med") from None
    return codes
