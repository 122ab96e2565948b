"""Readers: FORMAT, one file each; the only place that opens image files. Everything after takes an Image.

A reader is a module or package in this folder (or an entry point of group `geomed_mae.readers`) with these names:

    SUFFIXES: tuple[str, ...]     usual endings, lower case; a hint, never proof
    EXTRA, PACKAGE: str           the extra of geomed-mae and the import that it needs
    sniff(path, head) -> bool     does this format own the file, by its first bytes?
    header(path) -> Header | Refusal             one file, no pixels; a dataclass of plain values (see `wire`)
    group(headers, modalities) -> Survey         files that belong together become Sources
    read(source, window=None) -> Image           window: one slice a spatial axis, inside the image
    verify(source, statistics) -> flags          optional: a ReadError when the values of the pixels (one statistics
                                                 entry a channel) belie the metadata, flags when they may
    read_labels(path, onto: Image, query: LabelQuery) -> Labels      optional: labels on the grid of `onto`, by geometry
                                                 (only its shape and geometry are looked at, never its pixels)
    label_references(path) -> tuple[(kind, value), ...] | None       optional: the images that a label file names, as
                                                 pairs of `Source.identity`; None for a file that holds no labels

`header`, `group` and `read` report what is wrong with data as Refusal or ReadError with a Reason, nothing else.
Heavy packages are imported inside functions, so that listing readers needs none of them.

    registry, surveying, reading, label_reading     what this folder offers: readers, headers, pixels, labels
    source, reasons, labels                         what passes between readers and archives
    regular, child, wire                            safety: checked paths, decoding processes, what passes to them
    scenes, windows, plausible, label_grid          shared by several formats
"""

from __future__ import annotations

from geomed_mae.readers.label_reading import label_references, read_labels, read_labels_guarded
from geomed_mae.readers.labels import IGNORE, LabelQuery, Labels
from geomed_mae.readers.reading import limits, nothing_usable, read, read_guarded, read_image, read_images
from geomed_mae.readers.registry import load_readers, reader
from geomed_mae.readers.surveying import group_headers, header_of, survey

__all__ = [
    "IGNORE",
    "LabelQuery",
    "Labels",
    "group_headers",
    "header_of",
    "label_references",
    "limits",
    "load_readers",
    "nothing_usable",
    "read",
    "read_guarded",
    "read_image",
    "read_images",
    "read_labels",
    "read_labels_guarded",
    "reader",
    "survey",
]
