"""The whitelist of DICOM attributes, and how their values are decoded from raw bytes.

Decoding here instead of through pydicom's elements is several times faster, raises no warning that quotes a value, and
tells "absent" from "empty" from "not a number". Nothing beyond the whitelist is ever looked at.
Value representations: PS3.5 section 6.2; tags: PS3.6.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

TAGS = {
    "ImageType": 0x00080008,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "AcquisitionDate": 0x00080022,
    "AcquisitionDateTime": 0x0008002A,
    "AcquisitionTime": 0x00080032,
    "ContentTime": 0x00080033,
    "Modality": 0x00080060,
    "FrameType": 0x00089007,
    "AcquisitionContrast": 0x00089209,
    "PatientID": 0x00100020,
    "IssuerOfPatientID": 0x00100021,
    "ContrastBolusAgent": 0x00180010,
    "ScanningSequence": 0x00180020,
    "SequenceVariant": 0x00180021,
    "SliceThickness": 0x00180050,
    "KVP": 0x00180060,
    "RepetitionTime": 0x00180080,
    "EchoTime": 0x00180081,
    "InversionTime": 0x00180082,
    "SpacingBetweenSlices": 0x00180088,
    "TriggerTime": 0x00181060,
    "ImagerPixelSpacing": 0x00181164,
    "FlipAngle": 0x00181314,
    "FrameAcquisitionDateTime": 0x00189074,
    "InversionTimes": 0x00189079,
    "EffectiveEchoTime": 0x00189082,
    "DiffusionBValue": 0x00189087,
    "DiffusionGradientOrientation": 0x00189089,
    "StudyInstanceUID": 0x0020000D,
    "SeriesInstanceUID": 0x0020000E,
    "AcquisitionNumber": 0x00200012,
    "InstanceNumber": 0x00200013,
    "ImagePositionPatient": 0x00200032,
    "ImageOrientationPatient": 0x00200037,
    "FrameOfReferenceUID": 0x00200052,
    "TemporalPositionIdentifier": 0x00200100,
    "StackID": 0x00209056,
    "TemporalPositionIndex": 0x00209128,
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "PixelSpacing": 0x00280030,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "PixelPaddingValue": 0x00280120,
    "PixelPaddingRangeLimit": 0x00280121,
    "BurnedInAnnotation": 0x00280301,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "RescaleType": 0x00281054,
    "ModalityLUTSequence": 0x00283000,
    "Units": 0x00541001,
    "SharedFunctionalGroupsSequence": 0x52009229,
    "PerFrameFunctionalGroupsSequence": 0x52009230,
    "MRTimingAndRelatedParametersSequence": 0x00189112,
    "MREchoSequence": 0x00189114,
    "MRModifierSequence": 0x00189115,
    "MRDiffusionSequence": 0x00189117,
    "DiffusionGradientDirectionSequence": 0x00189076,
    "MRImageFrameTypeSequence": 0x00189226,
    "FrameContentSequence": 0x00209111,
    "PlanePositionSequence": 0x00209113,
    "PlaneOrientationSequence": 0x00209116,
    "PixelMeasuresSequence": 0x00289110,
    "PixelValueTransformationSequence": 0x00289145,
    "CTImageFrameTypeSequence": 0x00189329,
}
"""The whitelist: keyword to tag (PS3.6)."""

_WANTED = frozenset(TAGS.values())


class Values:
    """Whitelisted elements of one data set, decoded from raw bytes on demand."""

    def __init__(self, dataset: Dataset, *, big: bool) -> None:
        self._dataset = dataset
        self._order = ">" if big else "<"
        self._big = big
        self._raw = {int(element.tag): element.value for element in dataset.elements() if element.tag in _WANTED}

    def __contains__(self, keyword: str) -> bool:
        return TAGS[keyword] in self._raw

    def text(self, keyword: str) -> str:
        """Return the text without padding, "" when absent or empty."""
        value = self._raw.get(TAGS[keyword])
        if value is None:
            return ""
        return (value.decode("latin-1") if isinstance(value, bytes) else str(value)).strip("\0 \t\r\n")

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Return the upper-case components of a multi-valued code string."""
        text = self.text(keyword)
        return tuple(part.strip().upper() for part in text.split("\\")) if text else ()

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """Return decimal strings as numbers, NaN where one is not a number; None when absent or empty."""
        text = self.text(keyword)
        return tuple(_decimal(part) for part in text.split("\\")) if text else None

    def number(self, keyword: str) -> float | None:
        """Return one decimal string; NaN when it is not exactly one number, None when absent or empty."""
        values = self.numbers(keyword)
        return None if values is None else values[0] if len(values) == 1 else math.nan

    def doubles(self, keyword: str) -> tuple[float, ...] | None:
        """Return values of VR FD; None when absent, empty or of another length."""
        value = self._raw.get(TAGS[keyword])
        if not isinstance(value, bytes) or not value or len(value) % 8:
            return None
        return struct.unpack(f"{self._order}{len(value) // 8}d", value)

    def double(self, keyword: str) -> float | None:
        """Return the first value of VR FD."""
        values = self.doubles(keyword)
        return values[0] if values else None

    def whole(self, keyword: str) -> int | None:
        """Return a value of VR US, SS (as its unsigned bits) or UL; None when absent or of another length."""
        value = self._raw.get(TAGS[keyword])
        if not isinstance(value, bytes) or len(value) not in (2, 4):
            return None
        return struct.unpack(f"{self._order}{'H' if len(value) == 2 else 'L'}", value)[0]

    def items(self, keyword: str) -> list[Values]:
        """Return the items of a sequence, [] when absent."""
        if keyword not in self:
            return []
        sequence = self._dataset[TAGS[keyword]].value
        return [Values(item, big=self._big) for item in sequence or ()]


def _decimal(text: str) -> float:
    """Return a decimal string (PS3.5 VR DS) as a float; NaN for anything else, Python's own spellings included."""
    text = text.strip("\0 ")
    if not text or not set(text) <= set("0123456789+-.eE"):
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan
