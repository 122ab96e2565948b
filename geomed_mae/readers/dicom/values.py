"""The whitelist of DICOM attributes, and how their values are decoded from raw bytes.

Decoding here instead of through pydicom's elements is several times faster, raises no warning that quotes a value, and
tells "absent" from "empty" from "not a number". Nothing beyond the whitelist is ever looked at.
Value representations: PS3.5 section 6.2; tags: PS3.6.
"""

from __future__ import annotations

import math
import struct

from geomed_mae.readers.dicom.elements import Elements, items_of
from geomed_mae.readers.dicom.private import LARGE_TAGS, PRIVATE_TAGS

TAGS = {
    "ImageType": 0x00080008,
    "RecognitionCode": 0x00080010,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "SeriesDate": 0x00080021,
    "AcquisitionDate": 0x00080022,
    "AcquisitionDateTime": 0x0008002A,
    "SeriesTime": 0x00080031,
    "AcquisitionTime": 0x00080032,
    "ContentTime": 0x00080033,
    "Modality": 0x00080060,
    "FrameType": 0x00089007,
    "AcquisitionContrast": 0x00089209,
    "PatientID": 0x00100020,
    "IssuerOfPatientID": 0x00100021,
    "PatientWeight": 0x00101030,
    "ContrastBolusAgent": 0x00180010,
    "ContrastBolusAgentSequence": 0x00180012,
    "ScanningSequence": 0x00180020,
    "SequenceVariant": 0x00180021,
    "SliceThickness": 0x00180050,
    "ScanOptions": 0x00180022,
    "AngioFlag": 0x00180025,
    "KVP": 0x00180060,
    "RepetitionTime": 0x00180080,
    "EchoTime": 0x00180081,
    "InversionTime": 0x00180082,
    "SpacingBetweenSlices": 0x00180088,
    "TriggerTime": 0x00181060,
    "RadiopharmaceuticalStartTime": 0x00181072,
    "RadionuclideTotalDose": 0x00181074,
    "RadionuclideHalfLife": 0x00181075,
    "RadiopharmaceuticalStartDateTime": 0x00181078,
    "EstimatedRadiographicMagnificationFactor": 0x00181114,
    "ImagerPixelSpacing": 0x00181164,
    "FlipAngle": 0x00181314,
    "NominalScannedPixelSpacing": 0x00182010,
    "SequenceOfUltrasoundRegions": 0x00186011,
    "RegionSpatialFormat": 0x00186012,
    "PhysicalUnitsXDirection": 0x00186024,
    "PhysicalUnitsYDirection": 0x00186026,
    "PhysicalDeltaX": 0x0018602C,
    "PhysicalDeltaY": 0x0018602E,
    "FrameAcquisitionDateTime": 0x00189074,
    "ASLContext": 0x00189257,
    "AcquisitionType": 0x00189302,
    "InversionTimes": 0x00189079,
    "EchoPulseSequence": 0x00189008,
    "InversionRecovery": 0x00189009,
    "Spoiling": 0x00189016,
    "EchoPlanarPulseSequence": 0x00189018,
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
    "PlanarConfiguration": 0x00280006,
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
    "FloatPixelPaddingValue": 0x00280122,
    "DoubleFloatPixelPaddingValue": 0x00280123,
    "FloatPixelPaddingRangeLimit": 0x00280124,
    "DoubleFloatPixelPaddingRangeLimit": 0x00280125,
    "BurnedInAnnotation": 0x00280301,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "RescaleType": 0x00281054,
    "RedPaletteColorLookupTableDescriptor": 0x00281101,
    "GreenPaletteColorLookupTableDescriptor": 0x00281102,
    "BluePaletteColorLookupTableDescriptor": 0x00281103,
    "RedPaletteColorLookupTableData": 0x00281201,
    "GreenPaletteColorLookupTableData": 0x00281202,
    "BluePaletteColorLookupTableData": 0x00281203,
    "SegmentedRedPaletteColorLookupTableData": 0x00281221,
    "SegmentedGreenPaletteColorLookupTableData": 0x00281222,
    "SegmentedBluePaletteColorLookupTableData": 0x00281223,
    "ModalityLUTSequence": 0x00283000,
    "LUTDescriptor": 0x00283002,
    "ModalityLUTType": 0x00283004,
    "LUTData": 0x00283006,
    "CorrectedImage": 0x00280051,
    "RadiopharmaceuticalInformationSequence": 0x00540016,
    "Units": 0x00541001,
    "SUVType": 0x00541006,
    "DecayCorrection": 0x00541102,
    "ExtendedOffsetTable": 0x7FE00001,
    "ExtendedOffsetTableLengths": 0x7FE00002,
    "Manufacturer": 0x00080070,
    "SeriesDescription": 0x0008103E,
    "ComplexImageComponent": 0x00089208,
    "ProtocolName": 0x00181030,
    "ConvolutionKernel": 0x00181210,
    "CardiacSynchronizationSequence": 0x00189118,
    "SeriesNumber": 0x00200011,
    "NominalCardiacTriggerDelayTime": 0x00209153,
    "DimensionIndexValues": 0x00209157,
    "DimensionIndexPointer": 0x00209165,
    "DimensionIndexSequence": 0x00209222,
    "NominalPercentageOfCardiacPhase": 0x00209241,
    "TemporalPositionTimeOffset": 0x0020930D,
    "TemporalPositionSequence": 0x00209310,
    "EnergyWindowVector": 0x00540010,
    "DetectorVector": 0x00540020,
    "DetectorInformationSequence": 0x00540022,
    "PhaseVector": 0x00540030,
    "RRIntervalVector": 0x00540060,
    "TimeSlotVector": 0x00540070,
    "SliceVector": 0x00540080,
    "TimeSliceVector": 0x00540100,
    "FrameReferenceTime": 0x00541300,
    "SharedFunctionalGroupsSequence": 0x52009229,
    "PerFrameFunctionalGroupsSequence": 0x52009230,
    "MRTimingAndRelatedParametersSequence": 0x00189112,
    "MREchoSequence": 0x00189114,
    "MRModifierSequence": 0x00189115,
    "MRDiffusionSequence": 0x00189117,
    "DiffusionGradientDirectionSequence": 0x00189076,
    "MRImageFrameTypeSequence": 0x00189226,
    "MRArterialSpinLabelingSequence": 0x00189251,
    "FrameContentSequence": 0x00209111,
    "PlanePositionSequence": 0x00209113,
    "PlaneOrientationSequence": 0x00209116,
    "PixelMeasuresSequence": 0x00289110,
    "PixelValueTransformationSequence": 0x00289145,
    "CTImageFrameTypeSequence": 0x00189329,
    "RealWorldValueMappingSequence": 0x00409096,
    "RealWorldValueIntercept": 0x00409224,
    "RealWorldValueSlope": 0x00409225,
    "MeasurementUnitsCodeSequence": 0x004008EA,
    "CodeValue": 0x00080100,
    "FramePixelDataPropertiesSequence": 0x00289443,
    "XRayGeometrySequence": 0x00189476,
    "PrivateSUVCreator": 0x70530010,
    "PrivateSUVFactor": 0x70531000,
    "PrivateActivityFactor": 0x70531009,
    "PrivateScanCreator": 0x00090010,
    "PrivateScanDateTime": 0x0009100D,
    # Of SEG and RTSTRUCT (PS3.3 C.8.20 and C.8.8.5 to C.8.8.6), see `dicom.labels`.
    "SpecificCharacterSet": 0x00080005,
    "CodeMeaning": 0x00080104,
    "LongCodeValue": 0x00080119,
    "ReferencedSeriesSequence": 0x00081115,
    "ReferencedImageSequence": 0x00081140,
    "ReferencedInstanceSequence": 0x0008114A,
    "ReferencedSOPInstanceUID": 0x00081155,
    "ReferencedFrameNumber": 0x00081160,
    "StudiesContainingOtherReferencedInstancesSequence": 0x00081200,
    "SourceImageSequence": 0x00082112,
    "DerivationImageSequence": 0x00089124,
    "DimensionOrganizationType": 0x00209311,
    "TotalPixelMatrixColumns": 0x00480006,
    "SegmentationType": 0x00620001,
    "SegmentSequence": 0x00620002,
    "SegmentNumber": 0x00620004,
    "SegmentLabel": 0x00620005,
    "SegmentDescription": 0x00620006,
    "SegmentIdentificationSequence": 0x0062000A,
    "ReferencedSegmentNumber": 0x0062000B,
    "MaximumFractionalValue": 0x0062000E,
    "SegmentedPropertyTypeCodeSequence": 0x0062000F,
    "ReferencedFrameOfReferenceSequence": 0x30060010,
    "RTReferencedStudySequence": 0x30060012,
    "RTReferencedSeriesSequence": 0x30060014,
    "ContourImageSequence": 0x30060016,
    "StructureSetROISequence": 0x30060020,
    "ROINumber": 0x30060022,
    "ReferencedFrameOfReferenceUID": 0x30060024,
    "ROIName": 0x30060026,
    "ROIContourSequence": 0x30060039,
    "ContourSequence": 0x30060040,
    "ContourGeometricType": 0x30060042,
    "NumberOfContourPoints": 0x30060046,
    "ContourData": 0x30060050,
    "ReferencedROINumber": 0x30060084,
}
"""The whitelist: keyword to tag (PS3.6)."""

TAGS |= PRIVATE_TAGS
WANTED = frozenset(TAGS.values())
"""Tags of the whitelist that are read in every file."""

TAGS |= LARGE_TAGS
LARGE = frozenset(TAGS.values())
"""The same with the large private ones."""


class Values:
    """Whitelisted elements of one data set, decoded from raw bytes on demand."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._order = ">" if elements.big else "<"
        self._raw = elements.raw

    def __contains__(self, keyword: str) -> bool:
        return TAGS[keyword] in self._raw

    def text(self, keyword: str) -> str:
        """Return the text without padding, "" when absent or empty."""
        value = self._raw.get(TAGS[keyword])
        if value is None:
            return ""
        return value.decode("latin-1").strip("\0 \t\r\n")

    def text_at(self, tag: int) -> str:
        """Return the text, as `text` does, of a tag that is no part of the whitelist and was asked for by itself."""
        return self._raw.get(tag, b"").decode("latin-1").strip("\0 \t\r\n")

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
        if not value or len(value) % 8:
            return None
        return struct.unpack(f"{self._order}{len(value) // 8}d", value)

    def floats(self, keyword: str, size: int) -> tuple[float, ...] | None:
        """Return values of VR FL (`size` 4) or FD (8); None when absent, empty or of another length."""
        value = self._raw.get(TAGS[keyword])
        if not value or len(value) % size:
            return None
        return struct.unpack(f"{self._order}{len(value) // size}{'f' if size == 4 else 'd'}", value)

    def double(self, keyword: str) -> float | None:
        """Return the first value of VR FD."""
        values = self.doubles(keyword)
        return values[0] if values else None

    def whole(self, keyword: str) -> int | None:
        """Return a value of VR US, SS (as its unsigned bits) or UL; None when absent or of another length."""
        value = self._raw.get(TAGS[keyword])
        if value is None or len(value) not in (2, 4):
            return None
        return struct.unpack(f"{self._order}{'H' if len(value) == 2 else 'L'}", value)[0]

    def items(self, keyword: str) -> list[Values]:
        """Return the items of a sequence, [] when absent."""
        content = self._raw.get(TAGS[keyword])
        if not content:
            return []
        implicit = self._elements.implicit or TAGS[keyword] in self._elements.unknown
        return [Values(item) for item in items_of(content, implicit=implicit, big=self._elements.big, wanted=WANTED)]

    def words(self, keyword: str) -> tuple[int, ...] | None:
        """Return the values of VR US (SS as unsigned bits); None when absent, empty or of an odd length."""
        value = self._raw.get(TAGS[keyword])
        if not value or len(value) % 2:
            return None
        return struct.unpack(f"{self._order}{len(value) // 2}H", value)

    def raw(self, keyword: str) -> bytes:
        """Return the undecoded value, b"" when absent."""
        return self._raw.get(TAGS[keyword], b"")

    @property
    def big(self) -> bool:
        """Whether the values are big endian."""
        return self._elements.big


def _decimal(text: str) -> float:
    """Return a decimal string (PS3.5 VR DS) as a float; NaN for anything else, Python's own spellings included."""
    text = text.strip("\0 ")
    if not text or not set(text) <= set("0123456789+-.eE"):
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan
