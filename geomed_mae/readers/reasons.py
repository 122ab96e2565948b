"""Why a file did not become (part of) an Image: the closed list of codes that ledgers and messages use."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Typed reasons. The ledger's status of a refused file follows from the reason: see `status`."""

    # any format
    NOT_REGULAR = "not a regular file"
    LINK_LOOP = "a loop of symbolic links"
    OUTSIDE_ROOT = "a link that leaves the archive"
    PERMISSION = "not readable with this user's permissions"
    EMPTY = "a file of zero bytes"
    UNKNOWN_FORMAT = "no reader knows this format"
    VANISHED = "gone between listing and reading"
    TRUNCATED = "shorter than its header promises"
    DECODE_FAILED = "the pixel data does not decode"
    TOO_LARGE = "more pixels than the limit"
    ALL_INVALID = "no valid pixel"
    NO_INFORMATION = "every valid pixel has the same value"
    MODALITY_MISMATCH = "none of the chosen modalities fits"
    DUPLICATE = "the same bytes as another file"
    LABEL = "a label file, not an image"
    CLASS_UNKNOWN = "a class that the recipe does not know"
    HASH_MISMATCH = "its pixels are not those that were scanned"
    METADATA = "metadata of a scene, read with its bands"
    LEFT_OUT = "a file of a scene that its modality leaves out"
    MISSING_EXTRA = "the package that reads this format is not installed"
    # GeoTIFF
    NOT_TIFF = "not a TIFF by its first bytes"
    MALFORMED = "the structure does not parse"
    TOO_MANY_BANDS = "more bands than the limit"
    BLOCK_TOO_LARGE = "one block needs more memory than the limit"
    RATIO = "decodes to an implausible multiple of its size"
    DTYPE_UNSUPPORTED = "a pixel type that has no physical meaning here"
    BAND_MISMATCH = "bands do not match the modality"
    BAD_TRANSFORM = "the transform is not invertible"
    NODATA_INVALID = "the declared nodata cannot occur in this pixel type"
    SCENE_INCOMPLETE = "bands of a scene are missing or do not fit together"
    BASELINE_UNKNOWN = "neither metadata nor data say whether the reflectance offset applies"
    OFFSET_SUSPECT = "metadata and data disagree about the reflectance offset"
    UNIT_CONFLICT = "scale or offset disagrees with the modality"
    # DICOM and NIfTI
    NOT_DICOM = "not a DICOM file"
    NON_IMAGE = "a file without an image of its own"
    NO_PIXEL_DATA = "the header ends before the pixel data"
    MISSING_TAG = "a required attribute is missing"
    LENGTH_MISMATCH = "pixel data shorter than the header promises"
    DEFLATE_LIMIT = "a deflated data set beyond the limit"
    CODEC_MISSING = "no installed codec decodes this transfer syntax"
    DUP_CONFLICT = "one SOP instance with two different contents"
    DUP_POSITION = "several slices at one position"
    SLICE_GAP = "slices are missing"
    BAD_GEOMETRY = "positions or spacing are missing or impossible"
    BAD_RESCALE = "the rescale attributes are not finite numbers"
    BAD_FRAMES = "the frame count or functional groups are inconsistent"
    BURNED_IN = "pixels may show the patient's identity"
    LOCALIZER = "a localizer or scout"


UNSUPPORTED = frozenset(
    {
        Reason.UNKNOWN_FORMAT,
        Reason.MISSING_EXTRA,
        Reason.CODEC_MISSING,
        Reason.DTYPE_UNSUPPORTED,
        Reason.NON_IMAGE,
        Reason.LABEL,
    }
)
"""Reasons that blame this tool's scope, not the file."""

NOT_BAD = frozenset(
    {
        Reason.UNKNOWN_FORMAT,
        Reason.NON_IMAGE,
        Reason.LABEL,
        Reason.DUPLICATE,
        Reason.LOCALIZER,
        Reason.METADATA,
        Reason.LEFT_OUT,
    }
)
"""Reasons outside the error budget: a healthy archive holds such files."""


def status(reason: Reason) -> str:
    """Return the ledger status of a refused file: "unsupported" or "skipped"."""
    return "unsupported" if reason in UNSUPPORTED else "skipped"


OTHER_DICOM = "DICOM Modality"
"""Beginning of the detail of a MODALITY_MISMATCH that says no more than that a DICOM file is of another modality: a
folder of one patient holds many kinds of them."""
