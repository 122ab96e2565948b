"""Text that a person typed into a DICOM file, in the character set that the file declares (PS3.5 section 6.1.2)."""

from __future__ import annotations

from collections.abc import Iterable

from geomed_mae.readers.dicom.file import PARSE_ERRORS, quiet


def decoded_text(text: str, charset: str, delimiters: Iterable[int] = ()) -> str:
    """Return `text`, bytes read as Latin-1 (see `Values.text`), in the file's SpecificCharacterSet.

    At each of the bytes `delimiters` the first character set is back in force, as between the parts of a name.
    A character set that is unknown or does not fit leaves the text as it is: it is compared with names, not shown.
    """
    if text.isascii() and "\x1b" not in text:
        return text
    from pydicom.charset import convert_encodings, decode_bytes

    try:
        with quiet():
            encodings = convert_encodings([part.strip() for part in charset.split("\\")])
            return str(decode_bytes(text.encode("latin-1"), encodings, set(delimiters))).strip()
    except PARSE_ERRORS:
        return text
