"""What vendors say in private attributes only: diffusion weighting, whether an MR image is a magnitude or a phase,
and whether it is echo planar.

A private attribute (gggg,bbee) belongs to the creator named in (gggg,00bb) (PS3.5 section 7.8.1). De-identified files
often keep the attribute and lose its creator; the block that the vendor always uses is then taken, for files of that
vendor. Attributes and creators: PS3.15 table E.3.10-1 (safe private attributes), the vendors' conformance statements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geomed_mae.readers.dicom.values import Values

BLOCKS = range(0x10, 0x18)
"""Blocks in which a creator is looked for; scanners use the first ones (Philips seven), routers add a few."""

PRIVATE = {
    "SiemensImages": (0x0019, 0x0A, "SIEMENS MR HEADER", "SIEMENS"),
    "SiemensB": (0x0019, 0x0C, "SIEMENS MR HEADER", "SIEMENS"),
    "SiemensDirection": (0x0019, 0x0E, "SIEMENS MR HEADER", "SIEMENS"),
    "SiemensImageCsa": (0x0029, 0x10, "SIEMENS CSA HEADER", "SIEMENS"),
    "SiemensSeriesCsa": (0x0029, 0x20, "SIEMENS CSA HEADER", "SIEMENS"),
    "GeDirectionX": (0x0019, 0xBB, "GEMS_ACQU_01", "GE MEDICAL"),
    "GeDirectionY": (0x0019, 0xBC, "GEMS_ACQU_01", "GE MEDICAL"),
    "GeDirectionZ": (0x0019, 0xBD, "GEMS_ACQU_01", "GE MEDICAL"),
    "GeComponent": (0x0043, 0x2F, "GEMS_PARM_01", "GE MEDICAL"),
    "GeB": (0x0043, 0x39, "GEMS_PARM_01", "GE MEDICAL"),
    "PhilipsB": (0x2001, 0x03, "PHILIPS IMAGING DD 001", "PHILIPS"),
    "PhilipsEpiFactor": (0x2001, 0x13, "PHILIPS IMAGING DD 001", "PHILIPS"),
    "PhilipsLabelType": (0x2005, 0x29, "PHILIPS MR IMAGING DD 005", "PHILIPS"),
    "PhilipsDirectionRL": (0x2005, 0xB0, "PHILIPS MR IMAGING DD 001", "PHILIPS"),
    "PhilipsDirectionAP": (0x2005, 0xB1, "PHILIPS MR IMAGING DD 001", "PHILIPS"),
    "PhilipsDirectionFH": (0x2005, 0xB2, "PHILIPS MR IMAGING DD 001", "PHILIPS"),
    "UnitedB": (0x0065, 0x09, "IMAGE PRIVATE HEADER", "UIH"),
    "UnitedCount": (0x0065, 0x50, "IMAGE PRIVATE HEADER", "UIH"),
    "UnitedTiles": (0x0065, 0x51, "IMAGE PRIVATE HEADER", "UIH"),
    "UnitedDirection": (0x0065, 0x37, "IMAGE PRIVATE HEADER", "UIH"),
}
"""Name to (group, element within the block, creator, start of Manufacturer), the texts in upper case."""

LARGE = frozenset({"SiemensImageCsa", "SiemensSeriesCsa"})
"""100 kB a file: read for mosaics alone."""


def _tags(large: bool) -> dict[str, int]:
    found = {}
    for name, (group, element, _, _) in PRIVATE.items():
        if (name in LARGE) == large:
            for block in BLOCKS:
                found[f"{name}@{block:02X}"] = group << 16 | block << 8 | element
                found[f"Creator{group:04X}@{block:02X}"] = group << 16 | block
    return found


_KEYWORDS = {
    name: tuple((f"Creator{group:04X}@{block:02X}", f"{name}@{block:02X}") for block in BLOCKS)
    for name, (group, _, _, _) in PRIVATE.items()
}
"""Name to the keywords of creator and attribute in each block."""

PRIVATE_TAGS = _tags(large=False)
"""Keyword to tag of all of them but the large ones, for the whitelist of `dicom.values`."""

LARGE_TAGS = _tags(large=True)
"""The same for the large ones."""

GE_B_LIMIT = 100_000
"""GE adds 1,000,000,000 to some b-values; what is below this is the value."""

MR_CLASSES = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")
"""MR Image Storage and its enhanced form, for files from which Modality was removed."""

MAX_B = 50_000.0
"""s/mm^2; larger ones, and negative ones, are something else."""

COMPONENTS = {
    **dict.fromkeys(("P", "PHASE", "PHASE MAP", "P_FFE", "P_SE", "P_IR", "P_PCA", "VELOCITY MAP"), "PHASE"),
    **dict.fromkeys(("R", "REAL", "R_FFE", "R_SE", "R_IR"), "REAL"),
    **dict.fromkeys(("I", "IMAGINARY", "I_FFE", "I_SE", "I_IR"), "IMAGINARY"),
}
"""Values of ImageType from the third on, and of ComplexImageComponent (0008,9208), that mean no magnitude."""

GE_COMPONENTS = {1: "PHASE", 2: "REAL", 3: "IMAGINARY"}
"""Values of GE's (0043,102F); 0 is the magnitude."""


def keyword_of(values: Values, name: str) -> str:
    """Return the keyword of the block that holds a private attribute, "" when it is absent."""
    present = [(creator, keyword) for creator, keyword in _KEYWORDS[name] if keyword in values]
    if not present:
        return ""
    _, _, owner, vendor = PRIVATE[name]
    for creator, keyword in present:
        if values.text(creator).upper().startswith(owner):
            return keyword
    # The creators' own elements are gone: the block that the vendor always uses.
    orphaned = not any(values.text(creator) for creator, _ in _KEYWORDS[name])
    first = _KEYWORDS[name][0][1]
    return first if orphaned and first in values and values.text("Manufacturer").upper().startswith(vendor) else ""


def private_raw(values: Values, name: str) -> bytes:
    """Return the undecoded value of a private attribute, b"" when it is absent."""
    keyword = keyword_of(values, name)
    return values.raw(keyword) if keyword else b""


def diffusion(values: Values) -> tuple[float | None, tuple[float, ...] | None]:
    """Return (b-value in s/mm^2, gradient direction) of a vendor's private attributes, None where there is none."""
    vendor = values.text("Manufacturer").upper() if _is_mr(values) else ""
    weight, direction = None, None
    if vendor.startswith("GE") and "EP" in values.texts("ScanningSequence"):
        # GE writes the attribute in every MR image; only echo planar ones are known to mean a b-value by it.
        numbers = _numbers(values, "GeB")
        weight = numbers[0] % GE_B_LIMIT if numbers and math.isfinite(numbers[0]) else None
        direction = _joined(_numbers(values, f"GeDirection{axis}") for axis in "XYZ")
    elif vendor.startswith("SIEMENS"):
        weight, direction = _first(_numbers(values, "SiemensB")), _floats(values, "SiemensDirection", 8)
    elif vendor.startswith("PHILIPS"):
        weight = _first(_floats(values, "PhilipsB", 4))
        direction = _joined(_floats(values, f"PhilipsDirection{axis}", 4) for axis in ("RL", "AP", "FH"))
    elif vendor.startswith("UIH"):
        weight, direction = _first(_floats(values, "UnitedB", 8)), _floats(values, "UnitedDirection", 8)
    if weight is None or not 0 <= weight <= MAX_B:
        return None, None
    return weight, direction if direction and len(direction) == 3 and any(direction) else None


def component(values: Values, kinds: tuple[str, ...], declared: str) -> str:
    """Return PHASE, REAL or IMAGINARY for such parts of a complex MR image, "" for magnitudes and the unsaid.

    `kinds` are the values of ImageType or FrameType, `declared` is ComplexImageComponent.
    """
    if not _is_mr(values):
        return ""
    found = next((COMPONENTS[kind] for kind in (declared, *kinds[2:]) if kind in COMPONENTS), "")
    if not found and (keyword := keyword_of(values, "GeComponent")):
        words = values.words(keyword) or (0,)
        found = GE_COMPONENTS.get(words[0], "")
    return found


def label_type(values: Values) -> str:
    """Return LABEL or CONTROL of an image of arterial spin labelling, "" where nothing says so."""
    keyword = keyword_of(values, "PhilipsLabelType") if _is_mr(values) else ""
    return values.text(keyword).upper() if keyword else ""


def is_echo_planar(values: Values) -> bool:
    """Say whether an MR image is echo planar by a private attribute: Philips' ScanningSequence does not say so."""
    keyword = keyword_of(values, "PhilipsEpiFactor") if _is_mr(values) else ""
    return bool(keyword) and (values.whole(keyword) or 0) > 1


def _is_mr(values: Values) -> bool:
    modality = values.text("Modality").upper()
    return modality == "MR" or (not modality and values.text("SOPClassUID") in MR_CLASSES)


def _numbers(values: Values, name: str) -> tuple[float, ...] | None:
    keyword = keyword_of(values, name)
    return values.numbers(keyword) if keyword else None


def _floats(values: Values, name: str, size: int) -> tuple[float, ...] | None:
    """Return values of VR FL (size 4) or FD (size 8)."""
    keyword = keyword_of(values, name)
    return values.floats(keyword, size) if keyword else None


def _first(numbers: tuple[float, ...] | None) -> float | None:
    return numbers[0] if numbers and math.isfinite(numbers[0]) else None


def _joined(parts: object) -> tuple[float, ...] | None:
    found = list(parts)
    return tuple(part[0] for part in found) if all(found) else None
