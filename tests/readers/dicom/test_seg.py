"""DICOM SEG onto voxels: highdicom writes most of them, hand-made ones stand for what it does not write."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from geomed_mae import readers
from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, PlaneGeometry, VolumeGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import IGNORE, LabelQuery, read_labels, survey
from geomed_mae.readers.dicom.labels import label_references
from tests.make_dicom import dataset, patch, save, uid, write_series
from tests.make_labels import (
    frame_of,
    item,
    segment,
    write_complete_series,
    write_highdicom_seg,
    write_seg,
)

RNG = np.random.default_rng(3)
NAMES = ("background", "liver", "spleen")
QUERY = LabelQuery(classes=NAMES)
SHAPE = (5, 8, 6)


def volume(shape=SHAPE) -> np.ndarray:
    return RNG.integers(0, 1000, shape).astype(np.int16)


def classes(shape=SHAPE) -> np.ndarray:
    """Class numbers with empty slices at both ends, which writers leave out."""
    found = RNG.integers(0, 3, shape).astype(np.uint8)
    found[0] = found[-1] = 0
    return found


def image_of(folder: Path, modality: str = "ct") -> tuple[Image, tuple]:
    """The one image in a folder and its identity pairs."""
    files = sorted(folder.iterdir())
    (source,) = survey(files, resolve_modalities(modality)).sources
    return readers.read(source), source.identity


def asked(identity: tuple, **how) -> LabelQuery:
    return LabelQuery(**{"identity": identity, "classes": NAMES, **how})


def grid(affine: np.ndarray | None = None, shape=SHAPE) -> Image:
    if affine is None:
        affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    array = np.zeros((1, *shape), np.float32)
    return Image(array, np.ones_like(array, bool), (Channel(name="c"),), VolumeGeometry(affine), "ct")


def by_hand(path: Path, mask: np.ndarray, positions=None, **how) -> Path:
    """A SEG of one segment, a frame a slice, at the places of `grid`."""
    positions = positions or [(0, 0, 2.0 * number) for number in range(len(mask))]
    frames = [frame_of(pixels, place) for pixels, place in zip(mask, positions, strict=True)]
    return write_seg(path, frames, [segment(1, "Liver")], **how)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_what_highdicom_writes_lands_on_the_slices_it_was_drawn_on(tmp_path, kind):
    sources = write_complete_series(tmp_path / "ct", volume())
    truth = classes()
    mask = truth
    if kind == "FRACTIONAL":
        mask = np.stack([(truth == 1) * 0.51, (truth == 2) * 1.0], axis=-1).astype(np.float32)
        mask[1:4][mask[1:4] == 0] = 0.48  # below a half: outside
    # write_series numbers its files against the slices' order, and the sources are shuffled on top.
    order = [2, 0, 4, 1, 3]
    path = write_highdicom_seg(tmp_path / "seg.dcm", [sources[n] for n in order], mask[order], kind, NAMES[1:])
    image, identity = image_of(tmp_path / "ct")
    found = read_labels(path, image, asked(identity))
    np.testing.assert_array_equal(found.array, truth)
    assert found.names == NAMES and dict(found.counts)["label_voxels_outside_image"] == 0


def test_highdicoms_own_volume_of_a_seg_is_ours(tmp_path):
    import highdicom

    sources = write_complete_series(tmp_path / "ct", volume())
    path = write_highdicom_seg(tmp_path / "seg.dcm", sources, classes(), "BINARY", NAMES[1:])
    oracle = highdicom.seg.segread(path).get_volume(combine_segments=True)
    affine = oracle.affine  # (slice, row, column) to LPS mm, as ours
    found = read_labels(path, grid(affine, oracle.spatial_shape), QUERY).array
    np.testing.assert_array_equal(found, oracle.array)


def test_a_subset_of_the_slices_leaves_background_on_the_others(tmp_path):
    sources = write_complete_series(tmp_path / "ct", volume())
    truth = classes()
    path = write_highdicom_seg(tmp_path / "seg.dcm", sources[1:3], truth[1:3], "BINARY", NAMES[1:])
    image, identity = image_of(tmp_path / "ct")
    expected = np.zeros_like(truth)
    expected[1:3] = truth[1:3]
    np.testing.assert_array_equal(read_labels(path, image, asked(identity)).array, expected)
    part = read_labels(path, image.crop((slice(2, 5), slice(0, 8), slice(1, 6))), asked(identity))
    np.testing.assert_array_equal(part.array, expected[2:, :, 1:])
    assert dict(part.counts)["label_voxels_outside_image"] == (truth[1] > 0).sum() + (truth[2, :, 0] > 0).sum()


@pytest.mark.parametrize("flips", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("order", ["axial", "coronal"])
def test_frames_that_are_flipped_or_cut_another_way_land_on_the_same_voxels(tmp_path, flips, order):
    truth = classes() == 1
    turned, directions = truth, [np.array([0, 0, 2.0]), np.array([0, 1.0, 0]), np.array([1.0, 0, 0])]
    if order == "coronal":
        turned, directions = truth.transpose(1, 0, 2), [directions[1], directions[0], directions[2]]
    corner = np.zeros(3)
    for axis, flip in enumerate(flips, start=1):
        if flip < 0:
            turned = np.flip(turned, axis)
            corner = corner + directions[axis] * (turned.shape[axis] - 1)
            directions[axis] = -directions[axis]
    spacing = [float(np.linalg.norm(directions[axis])) for axis in (1, 2)]
    cosines = [*(directions[2] / spacing[1]), *(directions[1] / spacing[0])]
    places = [tuple(corner + number * directions[0]) for number in range(len(turned))]
    path = by_hand(tmp_path / "s.dcm", turned, places, orientation=cosines, spacing=spacing)
    np.testing.assert_array_equal(read_labels(path, grid(), QUERY).array, truth)


def test_tilted_series_are_labelled_slice_by_slice(tmp_path):
    affine = np.array([[0, 0, 1.0, 0], [0.83, 1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    truth = classes() == 1
    places = [tuple(affine[:3, 3] + number * affine[:3, 0]) for number in range(5)]
    path = by_hand(tmp_path / "s.dcm", truth, places)
    np.testing.assert_array_equal(read_labels(path, grid(affine), QUERY).array, truth)
    with pytest.raises(ReadError, match=r"frame 2 of s\.dcm lies 0\.170 mm beside the voxels of the image"):
        read_labels(path, grid(), QUERY)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"positions": [(0.5, 0, 2.0 * n) for n in range(5)]}, r"frame 1 of s\.dcm lies 0\.500 mm beside the voxels"),
        ({"positions": [(0, 0, 2.0 * n + 1) for n in range(5)]}, r"frame 1 of s\.dcm lies 1\.000 mm beside"),
        ({"spacing": (1.0, 1.1)}, r"mm beside the voxels of the image; make the segmentation on this image"),
        ({"spacing": (2.0, 2.0)}, r"the grid of s\.dcm differs from the image's in its pixel spacing or orientation"),
        ({"orientation": (0.8, 0.6, 0, -0.6, 0.8, 0)}, r"the grid of s\.dcm differs from the image's"),
        ({"positions": [(0, 0, 100 + 2.0 * n) for n in range(5)]}, r"labels of s\.dcm do not overlap the image"),
        ({"FrameOfReferenceUID": uid("elsewhere")}, r"s\.dcm lies in another frame of reference"),
    ],
)
def test_another_grid_is_refused(tmp_path, how, message):
    path = by_hand(tmp_path / "s.dcm", classes() == 1, **how)
    with pytest.raises(ReadError, match=message) as caught:
        read_labels(path, grid(), LabelQuery(identity=(("frame", uid("frame")),), classes=NAMES))
    assert caught.value.reason == "BAD_GEOMETRY"


def test_rounded_positions_are_the_same_grid(tmp_path):
    truth = classes() == 1
    places = [(0.004, -0.003, 2.0 * n + 0.004) for n in range(5)]
    np.testing.assert_array_equal(read_labels(by_hand(tmp_path / "s.dcm", truth, places), grid(), QUERY).array, truth)


def test_without_a_frame_of_reference_positions_decide(tmp_path):
    truth = classes() == 1
    path = by_hand(tmp_path / "s.dcm", truth, FrameOfReferenceUID=None)
    found = read_labels(path, grid(), LabelQuery(identity=(("frame", uid("frame")),), classes=NAMES))
    np.testing.assert_array_equal(found.array, truth)


def test_without_positions_the_instances_decide(tmp_path):
    files = write_series(tmp_path / "ct", volume())
    image, identity = image_of(tmp_path / "ct")
    truth = classes() == 1
    uids = [str(pydicom.dcmread(path).SOPInstanceUID) for path in files]  # in the order of slices
    frames = [frame_of(truth[number], None, source=(uids[number], None)) for number in (3, 1, 2)]
    path = write_seg(tmp_path / "s.dcm", frames, [segment(1, "liver")], FrameOfReferenceUID=None)
    np.testing.assert_array_equal(read_labels(path, image, asked(identity)).array, truth)
    with pytest.raises(ReadError, match="no one slice it belongs to"):
        read_labels(path, image, QUERY)
    bare = write_seg(tmp_path / "b.dcm", [frame_of(truth[1], None)], [segment(1, "liver")])
    with pytest.raises(ReadError, match=r"frame 1 of b\.dcm says nowhere where it lies"):
        read_labels(bare, image, QUERY)


def test_classes_are_found_by_label_then_by_coded_meaning_then_by_value(tmp_path):
    pixels = np.zeros((8, 6), np.uint8)
    frames = []
    for number in (7, 3, 9):
        pixels = np.zeros((8, 6), np.uint8)
        pixels[number - 3] = 1
        frames.append(frame_of(pixels, (0, 0, 2.0), number))
    described = [segment(7, "Segment_1", "Spleen", "78961009"), segment(3, "LIVER"), segment(9, "x", "y", "64033007")]
    path = write_seg(tmp_path / "s.dcm", frames, described)
    values = {"liver": 1, "spleen": 2, "64033007": 1}
    found = read_labels(path, grid(), LabelQuery(classes=NAMES, values=values)).array[1]
    assert (found[4] == 2).all() and (found[0] == 1).all() and (found[6] == 1).all() and (found > 0).sum() == 18
    with pytest.raises(ReadError, match=r"s\.dcm has the class 'x', which is none of background, liver, spleen") as e:
        read_labels(path, grid(), QUERY)
    assert e.value.reason == "CLASS_UNKNOWN"
    left_out = read_labels(path, grid(), LabelQuery(classes=NAMES, values={"spleen": 2})).array
    assert (left_out == 2).sum() == 6 and (left_out == 0).sum() == left_out.size - 6
    assert read_labels(path, grid()).names == ("background", "Segment_1", "LIVER", "x")


def test_overlapping_segments_put_the_higher_class_on_top(tmp_path):
    low, high = np.ones((8, 6), np.uint8), np.zeros((8, 6), np.uint8)
    high[2:4] = 1
    for order in ((1, 2), (2, 1)):
        pixels = {1: low, 2: high}
        frames = [frame_of(pixels[number], (0, 0, 0), number) for number in order]
        path = write_seg(tmp_path / "s.dcm", frames, [segment(1, "liver"), segment(2, "spleen")])
        found = read_labels(path, grid(), QUERY).array
        assert (found == 2).sum() == 12 and (found == 1).sum() == 36 and (found[1:] == 0).all()


def test_without_a_background_class_the_rest_is_unknown(tmp_path):
    truth = classes() == 1
    found = read_labels(by_hand(tmp_path / "s.dcm", truth), grid(), LabelQuery(classes=("liver", "other"))).array
    np.testing.assert_array_equal(found, np.where(truth, 0, IGNORE))


# projections and photographs


def plane_image(tmp_path, pixels: np.ndarray, **tags) -> tuple[list, list]:
    """Images and identities of a file of one or several frames without a place in space."""
    save(dataset(pixels, **{"Modality": "CR", **tags}), tmp_path / "im" / "a.dcm")
    sources = survey([tmp_path / "im" / "a.dcm"], resolve_modalities("xray")).sources
    return [readers.read(source) for source in sources], [source.identity for source in sources]


def test_a_projection_is_labelled_by_instance_and_size(tmp_path):
    pixels = RNG.integers(0, 4000, (8, 6)).astype(np.uint16)
    (image,), (identity,) = plane_image(tmp_path, pixels, SOPInstanceUID=uid("cr"))
    truth = classes()[2] == 1
    other = np.ones((8, 6), np.uint8)
    frames = [frame_of(other, None, source=(uid("another"), None)), frame_of(truth, None, source=(uid("cr"), None))]
    path = write_seg(tmp_path / "s.dcm", frames, [segment(1, "liver")], FrameOfReferenceUID=None)
    found = read_labels(path, image, asked(identity)).array
    assert found.shape == (8, 6)
    np.testing.assert_array_equal(found, truth)
    with pytest.raises(ReadError, match="can only belong to the image by its SOP instance"):
        read_labels(path, image, QUERY)
    with pytest.raises(ReadError, match="do not overlap the image"):
        read_labels(path, image, asked((("instance", uid("third")),)))
    small = [frame_of(truth[:4], None, source=(uid("cr"), None))]
    path = write_seg(tmp_path / "t.dcm", small, [segment(1, "liver")], FrameOfReferenceUID=None)
    with pytest.raises(ReadError, match=r"t\.dcm has 4 x 6 pixels, the image that it refers to 8 x 6"):
        read_labels(path, image, asked(identity))


def test_a_seg_that_names_one_image_for_all_of_it_needs_no_names_per_frame(tmp_path):
    (image,), (identity,) = plane_image(tmp_path, np.ones((8, 6), np.uint16) * 9, SOPInstanceUID=uid("cr"))
    truth = classes()[2] == 1
    referenced = item(ReferencedInstanceSequence=Items([item(ReferencedSOPInstanceUID=uid("cr"))]))
    path = write_seg(
        tmp_path / "s.dcm", [frame_of(truth, None)], [segment(1, "liver")], ReferencedSeriesSequence=Items([referenced])
    )
    np.testing.assert_array_equal(read_labels(path, image, asked(identity)).array, truth)
    assert ("instance", uid("cr")) in label_references(path)


def test_frames_of_one_clip_are_told_apart_by_their_numbers(tmp_path):
    clip = RNG.integers(0, 4000, (3, 8, 6)).astype(np.uint16)
    images, identities = plane_image(tmp_path, clip, SOPInstanceUID=uid("clip"), NumberOfFrames=3)
    truth = classes((5, 8, 6))[1:4] == 1
    frames = [frame_of(truth[number], None, source=(uid("clip"), number + 1)) for number in (2, 0)]
    path = write_seg(tmp_path / "s.dcm", frames, [segment(1, "liver")], FrameOfReferenceUID=None)
    for number in (0, 2):
        found = read_labels(path, images[number], asked(identities[number])).array
        np.testing.assert_array_equal(found, truth[number])
    with pytest.raises(ReadError, match="do not overlap the image"):
        read_labels(path, images[1], asked(identities[1]))


# encodings and damage


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless])
def test_label_maps_are_read_in_their_encodings(tmp_path, syntax):
    truth = classes((5, 40, 36))
    frames = [frame_of(pixels, (0, 0, 2.0 * number), None) for number, pixels in enumerate(truth)]
    described = [segment(1, "liver"), segment(2, "spleen")]
    native = UID(syntax) in (ImplicitVRLittleEndian, ExplicitVRBigEndian)
    how = {"syntax": syntax} if native else {}
    path = write_seg(tmp_path / "s.dcm", frames, described, SegmentationType="LABELMAP", **how)
    if not native:
        made = pydicom.dcmread(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.compress(syntax, generate_instance_uid=False)
            made.save_as(path)
    np.testing.assert_array_equal(read_labels(path, grid(shape=truth.shape), QUERY).array, truth)


@pytest.mark.parametrize("kind", ["LABELMAP", "BINARY"])
def test_deflated_frames_are_read(tmp_path, kind):
    truth = (classes() == 1).astype(np.uint8)
    path = by_hand(tmp_path / "s.dcm", truth, SegmentationType=kind)
    made = pydicom.dcmread(path)
    packed = [pixels if kind == "LABELMAP" else np.packbits(pixels, bitorder="little") for pixels in truth]
    streams = [zlib.compress(pixels.tobytes(), wbits=-15) for pixels in packed]
    made.PixelData = encapsulate([stream + b"\0" * (len(stream) % 2) for stream in streams])
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = JPEG2000Lossless
    made.save_as(path)
    # pydicom does not know the transfer syntax yet; its UID is as long, padded.
    patch(path, str(JPEG2000Lossless).encode(), b"1.2.840.10008.1.2.8.1\0")
    np.testing.assert_array_equal(read_labels(path, grid(), QUERY).array, truth)


def test_bits_in_big_endian_words_are_refused(tmp_path):
    path = by_hand(tmp_path / "s.dcm", classes() == 1, syntax=ExplicitVRBigEndian)
    with pytest.raises(ReadError, match="packs bits in big-endian words"):
        read_labels(path, grid(), QUERY)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"Rows": None}, "MISSING_TAG"),
        ({"NumberOfFrames": 60000, "Rows": 60000, "Columns": 60000}, "TOO_LARGE"),
        ({"NumberOfFrames": 4}, "BAD_FRAMES"),
        ({"PerFrameFunctionalGroupsSequence": None}, "BAD_FRAMES"),
        ({"SegmentSequence": Items([segment(5, "liver")])}, "MALFORMED"),
        ({"Rows": 9}, "LENGTH_MISMATCH"),
        ({"BitsAllocated": 16}, "DTYPE_UNSUPPORTED"),
        ({"SegmentationType": "SURFACE", "PixelData": b"ab"}, "DTYPE_UNSUPPORTED"),
        ({"DimensionOrganizationType": "TILED_FULL"}, "BAD_GEOMETRY"),
        ({"PixelData": None}, "NO_PIXEL_DATA"),
    ],
)
def test_inconsistent_segs_end_in_a_reason(tmp_path, how, reason):
    path = by_hand(tmp_path / "s.dcm", classes() == 1, **how)
    with pytest.raises(ReadError, match=r"s\.dcm") as caught:
        read_labels(path, grid(), QUERY)
    assert caught.value.reason == reason


def test_cut_files_end_in_a_reason(tmp_path):
    path = by_hand(tmp_path / "s.dcm", classes() == 1)
    whole = path.read_bytes()
    for size in range(140, len(whole) - 1, 61):
        path.write_bytes(whole[:size])
        with pytest.raises(ReadError):
            read_labels(path, grid(), QUERY)


def test_any_changed_byte_ends_in_an_array_or_a_reason(tmp_path):
    path = by_hand(tmp_path / "s.dcm", classes() == 1)
    whole = path.read_bytes()
    for _ in range(300):
        changed = bytearray(whole)
        for place in RNG.integers(132, len(whole), 3):
            changed[place] = RNG.integers(256)
        path.write_bytes(changed)
        try:
            assert read_labels(path, grid(), QUERY).array.shape == SHAPE
        except ReadError as error:
            assert error.reason in readers.reasons.Reason.__members__


def test_an_image_is_no_label_file(tmp_path):
    (path, *_) = write_series(tmp_path / "ct", volume())
    with pytest.raises(ReadError, match="is neither a SEG nor an RTSTRUCT") as caught:
        read_labels(path, grid(), QUERY)
    assert caught.value.reason == "NON_IMAGE" and label_references(path) is None
    flat = Image(
        np.zeros((1, 4, 4), np.float32), np.ones((1, 4, 4), bool), (Channel(name="c"),), PlaneGeometry(), "xray"
    )
    with pytest.raises(ReadError, match="can only belong"):
        read_labels(by_hand(tmp_path / "s.dcm", classes() == 1), flat, QUERY)
