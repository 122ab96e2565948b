"""Every file that pydicom bundles: pydicom's own pixels after the documented rescale, or a typed reason."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_color_lut, pixel_array

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.file import open_dicom
from geomed_mae.readers.dicom.image_header import Header, parse_header
from geomed_mae.readers.dicom.pixels import codec_problem, decode
from geomed_mae.readers.reasons import Reason

ROOT = Path(pydicom.__file__).parent / "data"
FILES = sorted(
    path
    for path in ROOT.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".txt", ".md", ".pyc", ".json", ".jpg")
)

REFUSED = {
    "ExplVR_BigEndNoMeta.dcm": "NOT_DICOM",
    "ExplVR_LitEndNoMeta.dcm": "NON_IMAGE",
    "JPEG-lossy.dcm": "CODEC_MISSING",
    "JPEG2000-embedded-sequence-delimiter.dcm": "TOO_LARGE",
    "JPGExtended.dcm": "CODEC_MISSING",
    "MR_truncated.dcm": "TRUNCATED",
    "SC_rgb_rle_32bit.dcm": "DTYPE_UNSUPPORTED",
    "SC_rgb_rle_32bit_2frame.dcm": "DTYPE_UNSUPPORTED",
    "badVR.dcm": "NON_IMAGE",
    "liver_1frame.dcm": "NON_IMAGE",
    "meta_missing_tsyntax.dcm": "MISSING_TAG",
    "nested_priv_SQ.dcm": "MISSING_TAG",
    "no_meta.dcm": "NOT_DICOM",
    "no_meta_group_length.dcm": "NO_PIXEL_DATA",
    "reportsi.dcm": "NON_IMAGE",
    "rtdose.dcm": "NON_IMAGE",
    "rtplan.dcm": "NON_IMAGE",
    "rtstruct.dcm": "NON_IMAGE",
    "waveform_ecg.dcm": "NON_IMAGE",
}
"""What must be refused, and why; JPEG Extended of 12 bits decodes with a package under the GPL alone."""

READ = 85
"""At least so many files give pixels: a reader that refuses everything would pass the other checks."""


def oracle(path: Path, header: Header, frame: int) -> np.ndarray:
    """Return pydicom's pixels of one frame after the documented steps, (rows, columns[, 3]) float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in one.file_meta:
            one.file_meta.TransferSyntaxUID = header.syntax
        pixels = pixel_array(one, index=frame)
        if header.photometric == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, one)
            return (pixels * (255 / (2.0 ** (8 * pixels.dtype.itemsize) - 1))).astype(np.float32)
    if header.samples == 3:
        return (pixels * (255 / (2.0**header.bits_stored - 1))).astype(np.float32)
    slope, intercept = float(one.get("RescaleSlope", 1)), float(one.get("RescaleIntercept", 0))
    return (pixels.astype(np.float64) * slope + intercept).astype(np.float32)


@pytest.fixture(autouse=True)
def quiet_oracle():
    """Pydicom logs and warns about its own test files; the reader must stay silent by itself."""
    logger = logging.getLogger("pydicom")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_bundled_file_equals_pydicom_or_has_a_reason(path):
    try:
        opened = open_dicom(path)
        header = parse_header(opened)
        frames = range(len(header.frames))[:3]
        found = decode(opened, header, frames, invert=False, channels=3 if header.coloured else 1)
    except ReadError as error:
        assert error.reason in Reason.__members__
        assert REFUSED.get(path.name, error.reason) == error.reason
        return
    assert path.name not in REFUSED
    for frame, (values, valid) in zip(frames, found, strict=True):
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values[valid], oracle(path, header, frame)[valid])


def test_most_bundled_images_are_read():
    count = 0
    for path in FILES:
        try:
            count += not codec_problem(parse_header(open_dicom(path)).syntax)
        except ReadError:
            continue
    assert count >= READ
