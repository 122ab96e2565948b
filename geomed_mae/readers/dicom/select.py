"""Which of the chosen modalities a DICOM file belongs to, and what is refused because it may show a name."""

from __future__ import annotations

from collections.abc import Sequence

from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom.image_header import Header
from geomed_mae.readers.reasons import OTHER_DICOM, Reason

FORMAT = "dicom"
"""How modality files call this format."""

CAPTURED_MODALITIES = frozenset({"DMS", "DOC", "ES", "GM", "IVUS", "OP", "OT", "SC", "US", "XC"})
"""Photographs, screen captures and ultrasound: their pixels often show names (PS3.15 annex E, option 113101)."""

IMAGE_MODALITIES = frozenset(
    {"AR", "BI", "BMD", "CR", "CT", "DG", "DX", "IO", "IVOCT", "KER", "LEN", "LS", "MG", "MR", "NM", "OAM", "OCT"}
    | {"OPM", "OPT", "OPTENF", "OPV", "OSS", "PA", "POS", "PT", "PX", "RF", "RG", "RTIMAGE", "SM", "TG", "VA", "XA"}
)
"""Other values of Modality for pictures (PS3.3 C.7.3.1.1.1), as messages may name them."""

COLOURS = 3
"""A modality of so many channels takes colour pictures as red, green and blue; any other one as luminance."""

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Root of the secondary capture SOP classes: screen shots, digitised film."""

LAST_RESORTS = ("unnamed-raster", "unnamed-volume")
"""Only "auto" offers these; nobody names them beside others by hand."""


def choose_modality(header: Header, modalities: Sequence[Modality]) -> Modality | tuple[Reason, str]:
    """Choose by DICOM's Modality, the first that fits, or return why none is chosen.

    Under "auto", what may show a name is refused unless its modality is asked for, and nothing is bound.
    """
    auto = any(modality.name in LAST_RESORTS for modality in modalities)
    fitting = (m for m in modalities if FORMAT in m.formats and header.modality in m.dicom)
    chosen = next((m for m in fitting if m.bind is None or not auto), None)
    captured = header.modality in CAPTURED_MODALITIES or (
        header.sop_class.startswith(SECONDARY_CAPTURE) and header.burned_in != "NO"
    )
    if auto and captured:
        return Reason.BURNED_IN, "a capture or ultrasound; name its modality to accept it"
    if header.burned_in == "YES" and (chosen is None or auto or header.modality not in CAPTURED_MODALITIES):
        return Reason.BURNED_IN, "BurnedInAnnotation is YES"
    if chosen is None or (chosen.geometry == "raster" and len(chosen.channels) != COLOURS):
        return Reason.MODALITY_MISMATCH, f"{OTHER_DICOM} '{_code(header.modality)}'"
    return chosen


def _code(text: str) -> str:
    """Return a code fit for a message: what is no known code could be anything, a name included."""
    return text if text in IMAGE_MODALITIES | CAPTURED_MODALITIES else "not in the standard"
