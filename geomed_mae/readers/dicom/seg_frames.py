"""The segments and frames of one DICOM SEG: what each frame shows, where it lies, its pixels (PS3.3 C.8.20, C.7.6.16).

A class is found by SegmentLabel, else by the meaning or value of SegmentedPropertyTypeCodeSequence, else by
SegmentDescription; segment numbers mean nothing beyond their file. FRACTIONAL frames are inside from FRACTION of their
maximum on.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.file import EXPLICIT_BIG, NATIVE_SYNTAXES, PARSE_ERRORS, PIXEL_DATA, Opened, quiet
from geomed_mae.readers.dicom.geometry import orientation_error, spacing_error
from geomed_mae.readers.dicom.limits import MAX_FRAME_PIXELS, MAX_FRAMES, MAX_IMAGE_VALUES
from geomed_mae.readers.dicom.text import decoded_text
from geomed_mae.readers.dicom.values import Values
from geomed_mae.readers.labels import ClassNumbers
from geomed_mae.readers.reasons import Reason

FRACTION = 0.5
"""Share of MaximumFractionalValue (probability or occupancy) from which a pixel belongs to its segment."""

DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
"""Deflated Image Frame Compression (PS3.5 A.4.14): made for segmentations, one deflate stream a frame."""

NOTHING = int(np.iinfo(np.int16).min)
"""What no segment covers, while frames are painted."""


class Segmentation:
    """A SEG's segments and frames, checked; pixels are decoded frame by frame."""

    def __init__(self, opened: Opened, place: str) -> None:
        values = opened.values
        self.place, self._opened, self._values = place, opened, values
        self.rows, self.columns = (self._whole(keyword) for keyword in ("Rows", "Columns"))
        self._bits = self._whole("BitsAllocated")
        text = values.text("NumberOfFrames") or "1"
        self.frames = int(text) if text.isdecimal() and len(text) < 10 else 0
        self._kind = values.text("SegmentationType").upper() or "LABELMAP"
        self._shared = (values.items("SharedFunctionalGroupsSequence") or [values])[0]
        self._shared_groups: dict[str, Values | None] = {}
        self._groups = values.items("PerFrameFunctionalGroupsSequence")
        self._check()
        self._segments = {item.whole("SegmentNumber"): item for item in values.items("SegmentSequence")}
        self._maximum = values.whole("MaximumFractionalValue") or 0
        self._charset = values.text("SpecificCharacterSet")
        self._stored = self._pixel_bytes()

    def _whole(self, keyword: str) -> int:
        value = self._values.whole(keyword)
        if not value:
            raise ReadError(f"{self.place}: {keyword} is missing or 0", Reason.MISSING_TAG.name)
        return value

    def _check(self) -> None:
        pixels = self.rows * self.columns
        if self.frames < 1 or self.frames > MAX_FRAMES or pixels > MAX_FRAME_PIXELS:
            raise ReadError(
                f"{self.place} has {self.frames} frames of {self.rows} x {self.columns}; {MAX_FRAMES} frames of "
                f"{MAX_FRAME_PIXELS} pixels may be",
                (Reason.TOO_LARGE if self.frames > 0 else Reason.BAD_FRAMES).name,
            )
        if pixels * self.frames > MAX_IMAGE_VALUES:
            raise ReadError(f"{self.place} has more than {MAX_IMAGE_VALUES} pixels", Reason.TOO_LARGE.name)
        if self._values.text("DimensionOrganizationType").upper() == "TILED_FULL" or (
            "TotalPixelMatrixColumns" in self._values
        ):
            raise ReadError(f"{self.place} segments a tiled slide, which is not read", Reason.BAD_GEOMETRY.name)
        if self._groups and len(self._groups) != self.frames:
            raise ReadError(
                f"{len(self._groups)} functional groups of {self.place} describe {self.frames} frames",
                Reason.BAD_FRAMES.name,
            )
        if not self._groups and self.frames > 1:
            raise ReadError(f"the frames of {self.place} are not described", Reason.BAD_FRAMES.name)
        known = {"BINARY": (1, 8), "FRACTIONAL": (8,), "LABELMAP": (8, 16)}
        if self._bits not in known.get(self._kind, ()):
            raise ReadError(
                f"{self.place} is a segmentation of another type than {', '.join(known)}, or not of their bits",
                Reason.DTYPE_UNSUPPORTED.name,
            )

    def _group(self, frame: int, keyword: str) -> Values | None:
        """Return the functional group `keyword` of a frame: its own, or the shared one."""
        own = self._groups[frame].items(keyword) if self._groups else []
        if own:
            return own[0]
        if keyword not in self._shared_groups:
            self._shared_groups[keyword] = next(iter(self._shared.items(keyword)), None)
        return self._shared_groups[keyword]

    def position(self, frame: int) -> tuple[float, ...] | None:
        """Return ImagePositionPatient of a frame in mm, None where the SEG has no place in space."""
        group = self._group(frame, "PlanePositionSequence")
        return None if group is None else group.numbers("ImagePositionPatient")

    def steps(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps (3,) in LPS mm from a frame's pixel to that in the next row, and in the next column."""
        orientation, measures = (
            self._group(frame, keyword) for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence")
        )
        cosines = None if orientation is None else orientation.numbers("ImageOrientationPatient")
        spacing = None if measures is None else measures.numbers("PixelSpacing")
        if problem := orientation_error(cosines) or spacing_error(spacing):
            raise ReadError(f"{self.place}: {problem}", Reason.BAD_GEOMETRY.name)
        first, second = np.reshape(cosines, (2, 3))
        return second * spacing[0], first * spacing[1]

    def sources(self, frame: int) -> list[tuple[str, int | None]]:
        """Return the (SOP instance UID, frame number or None) pairs that a frame was drawn on."""
        found = list(self._referenced(self._groups[frame])) if self._groups else []
        found = found or list(self._referenced(self._shared))
        if not found:
            series = self._values.items("ReferencedSeriesSequence")
            one = {
                item.text("ReferencedSOPInstanceUID") for s in series for item in s.items("ReferencedInstanceSequence")
            }
            # With a single image behind the whole object, there is nothing to mistake it for.
            found = [(uid, None) for uid in one] if len(one) == 1 else []
        return found

    @staticmethod
    def _referenced(group: Values) -> Iterator[tuple[str, int | None]]:
        for derivation in group.items("DerivationImageSequence"):
            for source in derivation.items("SourceImageSequence"):
                number = source.number("ReferencedFrameNumber")
                whole = int(number) if number is not None and number == number and abs(number) < MAX_FRAMES else None
                yield source.text("ReferencedSOPInstanceUID"), whole

    def classes(self, frame: int, numbers: ClassNumbers) -> np.ndarray | None:
        """Return class numbers int16 (rows, columns) of a frame, NOTHING outside segments; None for one left out."""
        if self._kind == "LABELMAP":
            return self._mapped(self._decode(frame), numbers)
        identified = self._group(frame, "SegmentIdentificationSequence")
        segment = None if identified is None else identified.whole("ReferencedSegmentNumber")
        if segment is None and len(self._segments) == 1:
            segment = next(iter(self._segments))
        number = self._number(segment, numbers)
        if number is None:
            return None
        pixels = self._decode(frame)
        if self._kind == "FRACTIONAL":
            if self._maximum < 1:
                raise ReadError(f"{self.place}: MaximumFractionalValue is missing or 0", Reason.MISSING_TAG.name)
            inside = pixels >= FRACTION * self._maximum
        else:
            inside = pixels != 0
        return np.where(inside, np.int16(number), np.int16(NOTHING))

    def _mapped(self, pixels: np.ndarray, numbers: ClassNumbers) -> np.ndarray:
        # Segment 0 is the background (PS3.3 C.8.20.2.3.3 reserves it), and so is padding.
        background = {0, self._values.whole("PixelPaddingValue") or 0}
        table = np.full(int(pixels.max()) + 1, NOTHING, np.int16)
        for segment in np.unique(pixels).tolist():
            number = None if segment in background else self._number(segment, numbers)
            table[segment] = NOTHING if number is None else number
        return table[pixels]

    def _number(self, segment: int | None, numbers: ClassNumbers) -> int | None:
        item = self._segments.get(segment)
        if segment is None or item is None:
            raise ReadError(f"{self.place} has a frame of a segment it does not describe", Reason.MALFORMED.name)
        coded = item.items("SegmentedPropertyTypeCodeSequence")
        also = [one.text(keyword) for one in coded for keyword in ("CodeMeaning", "CodeValue", "LongCodeValue")]
        also.append(item.text("SegmentDescription"))  # of a name that is too long for a label
        label, *others = (decoded_text(text, self._charset) for text in (item.text("SegmentLabel"), *also))
        return numbers.number_of(label, others)

    def _pixel_bytes(self) -> bytes:
        """Return the value of the pixel element, its length checked against the header."""
        opened = self._opened
        native = opened.syntax in NATIVE_SYNTAXES
        bits = self.frames * self.rows * self.columns * self._bits
        expected = -(-bits // 8)
        if opened.pixel_tag != PIXEL_DATA:
            raise ReadError(f"{self.place} ends before its pixel data", Reason.NO_PIXEL_DATA.name)
        if native and opened.bytes_left < expected <= opened.pixel_length:
            raise ReadError(f"{self.place}: {opened.bytes_left} of {expected} bytes are there", Reason.TRUNCATED.name)
        if native and not expected <= opened.pixel_length <= opened.bytes_left:
            raise ReadError(
                f"{self.place}: {opened.pixel_length} bytes of pixel data are declared, {expected} expected",
                Reason.LENGTH_MISMATCH.name,
            )
        if not native and (not opened.fragments.complete or len(opened.fragments.spans) < self.frames):
            raise ReadError(f"{self.place}: compressed frames are missing", Reason.TRUNCATED.name)
        with opened.body() as file:
            file.seek(opened.pixel_start)
            return file.read(expected if native else opened.bytes_left)

    def _decode(self, frame: int) -> np.ndarray:
        """Return the stored values (rows, columns) of a frame, unsigned integers."""
        size, syntax = self.rows * self.columns, self._opened.syntax
        try:
            if syntax in NATIVE_SYNTAXES:
                values = self._native(frame, size)
            elif syntax == DEFLATED_FRAMES:
                values = _unpacked(self._inflated(frame, -(-size * self._bits // 8)), self._bits, 0, size)
            else:
                values = self._decompressed(frame)
        except PARSE_ERRORS as error:
            if isinstance(error, ReadError):
                raise
            raise ReadError(
                f"frame {frame + 1} of {self.place} does not decode ({type(error).__name__})", Reason.DECODE_FAILED.name
            ) from None
        return values.reshape(self.rows, self.columns)

    def _native(self, frame: int, size: int) -> np.ndarray:
        big = self._opened.syntax == EXPLICIT_BIG
        if big and self._bits == 1:
            raise ReadError(f"{self.place} packs bits in big-endian words", Reason.DTYPE_UNSUPPORTED.name)
        values = _unpacked(self._stored, self._bits, frame * size, size)
        return values.byteswap() if big else values

    def _inflated(self, frame: int, expected: int) -> bytes:
        start, length = self._opened.fragments.spans[frame]
        start -= self._opened.pixel_start
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(self._stored[start : start + length], expected)
        if len(data) < expected:
            raise ReadError(f"frame {frame + 1} of {self.place} is too short", Reason.LENGTH_MISMATCH.name)
        return data

    def _decompressed(self, frame: int) -> np.ndarray:
        from pydicom.pixels import get_decoder
        from pydicom.uid import UID

        try:
            with quiet():
                decoder = get_decoder(UID(self._opened.syntax))
        except (NotImplementedError, ValueError):
            raise ReadError(f"{self.place}: no decoder for its transfer syntax", Reason.CODEC_MISSING.name) from None
        if not decoder.is_available:
            raise ReadError(f"{self.place} needs a codec: pip install 'geomed-mae[med]'", Reason.CODEC_MISSING.name)
        with quiet():
            values, _ = decoder.as_array(
                self._stored,
                index=frame,
                raw=True,
                rows=self.rows,
                columns=self.columns,
                samples_per_pixel=1,
                photometric_interpretation="MONOCHROME2",
                bits_allocated=self._bits,
                bits_stored=self._bits,
                pixel_representation=0,
                number_of_frames=self.frames,
                pixel_keyword="PixelData",
            )
        return values


def _unpacked(data: bytes, bits: int, first: int, count: int) -> np.ndarray:
    """Return `count` samples from sample `first` on; single bits are packed from the lowest up (PS3.5 8.1.1)."""
    if bits > 1:
        return np.frombuffer(data, np.dtype(f"<u{bits // 8}"), count, first * bits // 8)
    start, stop = first // 8, -(-(first + count) // 8)
    unpacked = np.unpackbits(np.frombuffer(data, np.uint8)[start:stop], bitorder="little")
    return unpacked[first - 8 * start :][:count]
