"""Small files of every format that `fuzz` damages. A seed is a file, or a folder whose first file is the one read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests import make_data, make_dicom, make_labels, make_pictures, make_scenes


def _scene(seed: int, dtype: str, bands: int = 2, size: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.integers(0, 9, (bands, size, size)), axis=2)
    return (smooth % 251).astype(dtype)


def geotiff(folder: Path) -> None:
    """Every compression, layout and side structure that the reader takes."""
    write = make_data.write_geotiff
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    write(folder / "plain.tif", _scene(1, "uint16"))
    write(folder / "float.tif", _scene(2, "float32"), nodata=float("nan"), descriptions=("red", "nir"))
    write(folder / "mask.tif", _scene(3, "uint8"), mask=_scene(4, "uint8", 1)[0] > 40, **tiled)
    write(folder / "big.tif", _scene(5, "int16"), BIGTIFF="YES", compress="deflate", **tiled)
    write(folder / "jpeg.tif", _scene(6, "uint8", 1), compress="jpeg", **tiled)
    write(folder / "scaled.tif", _scene(7, "int16"), scales=(0.5, 0.25), offsets=(1.0, 2.0), nodata=-1, predictor=2)
    for number, method in enumerate(("deflate", "lzw", "zstd", "lerc", "packbits"), start=10):
        write(folder / f"{method}.tif", _scene(number, "uint16"), compress=method, nodata=0, interleave="band")


def dicom(folder: Path) -> None:
    """Native, deflated and every codec; enhanced objects; tables; files of pydicom's that no writer of ours makes."""
    from pydicom.data import get_testdata_file
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

    slice_ = _scene(20, "int16", 1)[0]
    make_dicom.write_slice(folder / "native.dcm", slice_)
    make_dicom.write_slice(folder / "pet", slice_, Modality="PT", Units="BQML", RescaleSlope="1e-3", RescaleIntercept=0)
    place = {"PixelSpacing": [1, 1], "ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    syntaxes = {
        "implicit": ImplicitVRLittleEndian,
        "big": ExplicitVRBigEndian,
        "deflated": DeflatedExplicitVRLittleEndian,
    }
    for name, syntax in syntaxes.items():
        make_dicom.save(make_dicom.dataset(slice_, **place), folder / name, syntax=syntax)
    make_dicom.save(make_dicom.dataset(slice_.astype("uint16"), Modality="CR", WindowCenter="3"), folder / "plane")
    frames = [{"position": (0.0, 0.0, 2.0 * n)} for n in range(3)]
    make_dicom.save(make_dicom.enhanced(_scene(21, "uint16", 3), frames), folder / "enhanced")
    csa = make_dicom.csa_header({"NumberOfImagesInMosaic": ["5"], "SliceNormalVector": ["0", "0", "1"]})
    make_dicom.save(make_dicom.mosaic(_scene(22, "uint16", 5, 12), csa=csa, images=5), folder / "mosaic")
    names = ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_dcmtk.dcm")
    for name in (*names, "JPEG-LL.dcm", "examples_palette.dcm", "mlut_18.dcm"):
        found = get_testdata_file(name, download=False)
        if found and Path(found).stat().st_size < 1 << 18:
            (folder / name).write_bytes(Path(found).read_bytes())


def nifti(folder: Path) -> None:
    """NIfTI-1 and 2, plain and compressed, three and four axes."""
    volume = _scene(30, "int16", 12, 12)
    make_data.write_nifti(folder / "one.nii", volume, slope=0.5, inter=-3.0)
    make_data.write_nifti(folder / "two.nii", volume.astype("float64"), version=2)
    make_data.write_nifti(folder / "four.nii", np.stack([volume, volume + 1], axis=-1))
    make_data.write_nifti(folder / "packed.nii.gz", volume.astype("uint8"))


def picture(folder: Path) -> None:
    """PNG in its colour types, JPEG in grey, colour and progressive."""
    from PIL import Image

    grey, colour = _scene(40, "uint8", 1)[0], np.moveaxis(_scene(41, "uint8", 3), 0, -1)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype("uint16") * 200).save(folder / "deep.png")
    Image.fromarray(colour).save(folder / "colour.png")
    Image.fromarray(colour).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(colour).quantize(16).save(folder / "palette.png")
    make_pictures.write_png(folder / "laced.png", grey, 0, interlaced=True)
    Image.fromarray(grey).save(folder / "grey.jpg", quality=80)
    Image.fromarray(colour).save(folder / "colour.jpg", quality=80, progressive=True)


def jp2(folder: Path) -> None:
    """JPEG 2000 as satellite products carry it: one tile, many tiles, three bands, metadata."""
    make_scenes.write_jp2(folder / "one.jp2", _scene(50, "uint16", 1, 64))
    make_scenes.write_jp2(folder / "tiles.jp2", _scene(51, "uint16", 1, 150))
    make_scenes.write_jp2(folder / "three.jp2", _scene(52, "uint8", 3, 96), WRITE_METADATA="YES")


def seg(folder: Path) -> None:
    """Packed bits, shares, label maps, RLE."""
    mask = _scene(60, "uint8", 3) > 120
    segments = [make_labels.segment(1, "liver"), make_labels.segment(2, "kidney", "Kidney", "64033007")]
    frames = [make_labels.frame_of(mask[n], (0.0, 0.0, 2.0 * n), 1 + n % 2) for n in range(3)]
    make_labels.write_seg(folder / "bits", frames, segments)
    shares = [make_labels.frame_of(mask[n] * 255, (0.0, 0.0, 2.0 * n)) for n in range(3)]
    make_labels.write_seg(folder / "shares", shares, segments, SegmentationType="FRACTIONAL")
    maps = [make_labels.frame_of(mask[n] * 1, (0.0, 0.0, 2.0 * n), None) for n in range(3)]
    make_labels.write_seg(folder / "map", maps, segments, SegmentationType="LABELMAP")


def rtstruct(folder: Path) -> None:
    """Squares with a hole, on slices, and regions of other kinds."""
    square = make_labels.square
    regions = {
        "liver": [square(3, 30, 0.0), square(8, 20, 0.0), square(3, 30, 2.0)],
        "kidney": [square(31, 40, 4.0)],
        "seed": [make_labels.contour([(1.0, 1.0, 0.0)], ContourGeometricType="POINT")],
    }
    make_labels.write_rtstruct(folder / "one", regions)
    make_labels.write_rtstruct(folder / "named", {"liver": [square(5, 25, 2.0)]}, series=make_dicom.uid("series"))


def _features() -> list[dict]:
    rings = [
        [[500050, 3999950], [500350, 3999950], [500350, 3999700], [500050, 3999700], [500050, 3999950]],
        [[500100, 3999900], [500150, 3999900], [500150, 3999850], [500100, 3999850], [500100, 3999900]],
    ]
    other = [[[500300, 3999650], [500460, 3999650], [500460, 3999540], [500300, 3999650]]]
    return [
        {"type": "Feature", "properties": {"class": "water"}, "geometry": {"type": "Polygon", "coordinates": rings}},
        {
            "type": "Feature",
            "properties": {"class": "forest"},
            "geometry": {"type": "MultiPolygon", "coordinates": [other]},
        },
    ]


def geojson(folder: Path) -> None:
    """A collection in map units and one without a coordinate system."""
    crs = {"type": "name", "properties": {"name": "EPSG:32611"}}
    made = {"type": "FeatureCollection", "features": _features()}
    (folder / "map.geojson").write_text(json.dumps({**made, "crs": crs}))
    (folder / "degrees.geojson").write_text(json.dumps(made))


def _write_vector(path: Path, driver: str) -> None:
    import pyogrio
    import shapely

    shapes = np.array([shapely.from_geojson(json.dumps(one["geometry"])) for one in _features()])
    pyogrio.raw.write(
        str(path),
        geometry=shapely.to_wkb(shapes),
        field_data=[np.array(["water", "forest"], object)],
        fields=["class"],
        driver=driver,
        geometry_type="MultiPolygon" if driver == "GPKG" else "Polygon",
        crs="EPSG:32611",
        promote_to_multi=driver == "GPKG",
    )


def gpkg(folder: Path) -> None:
    """One table, its database small."""
    _write_vector(folder / "one.gpkg", "GPKG")
    with sqlite3.connect(folder / "one.gpkg") as base:
        base.execute("delete from gpkg_spatial_ref_sys where srs_id not in (-1, 0, 4326, 32611)")
    base.close()


def shapefile(folder: Path) -> None:
    """Four files that belong together."""
    (folder / "one").mkdir()
    _write_vector(folder / "one" / "a.shp", "ESRI Shapefile")


SEEDS: dict[str, Callable[[Path], None]] = {
    "geotiff": geotiff,
    "dicom": dicom,
    "nifti": nifti,
    "picture": picture,
    "jp2": jp2,
    "seg": seg,
    "rtstruct": rtstruct,
    "geojson": geojson,
    "gpkg": gpkg,
    "shapefile": shapefile,
}
"""Format -> what writes its seeds. The last five are labels."""
