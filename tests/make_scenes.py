"""Tiny Earth-observation products as providers lay them out: Sentinel-2 SAFE and Landsat folders, JPEG 2000."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geomed_mae.readers.geotiff.open import rasterio
from tests.make_data import UTM_10M, write_geotiff

L2A_METRES = {
    "B01": 60, "B02": 10, "B03": 10, "B04": 10, "B05": 20, "B06": 20, "B07": 20, "B08": 10, "B8A": 20, "B09": 60,
    "B11": 20, "B12": 20,
}  # fmt: skip
"""Finest resolution of each band of Level-2A, in metres."""
L1C_METRES = {**L2A_METRES, "B10": 60}
TILE = "T32TQM_20220611T101559"


def grid(metres: float, corner: tuple[float, float] = (UTM_10M[2], UTM_10M[5])) -> tuple[float, ...]:
    """Transform of a north-up grid of square pixels at the corner (x, y) of UTM_10M."""
    return (metres, 0.0, corner[0], 0.0, -metres, corner[1])


def write_jp2(
    path: Path,
    array: np.ndarray,
    *,
    transform: tuple = UTM_10M,
    crs: str = "EPSG:32632",
    namespaces: dict[str, dict[str, str]] | None = None,
    **options: object,
) -> Path:
    """Write (bands, rows, columns) or (rows, columns) as lossless JPEG 2000 in tiles of 64 pixels.

    `namespaces` is metadata by GDAL domain; it is written with the option WRITE_METADATA="YES".
    """
    rio = rasterio()
    array = array[None] if array.ndim == 2 else array
    profile = {"driver": "JP2OpenJPEG", "count": array.shape[0], "height": array.shape[1], "width": array.shape[2]}
    lossless = {"QUALITY": "100", "REVERSIBLE": "YES", "YCBCR420": "NO", "tiled": True}
    lossless |= {"BLOCKXSIZE": 64, "BLOCKYSIZE": 64}
    profile |= {"dtype": array.dtype, "crs": crs, "transform": rio.Affine(*transform), **lossless, **options}
    with rio.open(path, "w", **profile) as file:
        file.write(array)
        for domain, items in (namespaces or {}).items():
            file.update_tags(ns=domain, **items)
    return path


def reflectances(rows: int, columns: int, seed: int, *, dark: float = 0.02, bright: float = 0.4) -> np.ndarray:
    """Reflectance (rows, columns) of a landscape: shadows and water near `dark`, land up to `bright`."""
    return np.random.default_rng(seed).uniform(dark, bright, (rows, columns))


def numbers(reflectance: np.ndarray, add: float = 0.0) -> np.ndarray:
    """Return Sentinel-2's stored numbers: reflectance = (number + add) / 10000."""
    return np.clip(np.rint(reflectance * 10000 - add), 1, 65535).astype(np.uint16)


def metadata(level: str, baseline: str, add: float | None, quantification: float = 10000) -> str:
    """Return the parts of MTD_MSIL2A.xml (or L1C) that matter, in their place."""
    tag, quant = (
        ("BOA_ADD_OFFSET", "BOA_QUANTIFICATION_VALUE")
        if level == "L2A"
        else ("RADIO_ADD_OFFSET", "QUANTIFICATION_VALUE")
    )
    offsets = "" if add is None else "".join(f'<{tag} band_id="{n}">{add:g}</{tag}>' for n in range(13))
    return (
        '<?xml version="1.0" encoding="UTF-8" standalone="no"?>'
        '<n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product.xsd"><n1:General_Info>'
        f"<Product_Info><PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info>"
        f'<Product_Image_Characteristics><{quant} unit="none">{quantification:g}</{quant}>{offsets}'
        "</Product_Image_Characteristics></n1:General_Info></n1:Level-2A_User_Product>"
    )


def safe_l2a(
    root: Path,
    *,
    baseline: str = "0400",
    add: float = -1000,
    rows: int = 120,
    bands: dict[str, int] = L2A_METRES,
    suffix: str = "jp2",
    xml: str | None = "as the baseline says",
    dark: float = 0.02,
    bright: float = 0.4,
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a Level-2A product of one tile with `rows` squared 10 m pixels; `add` is what its numbers carry.

    Each band comes at its finest and all coarser resolutions, as in real products, beside previews and quality maps.
    `xml` None leaves the metadata out. Returns the product's folder and the stored numbers at the finest resolution.
    """
    product = root / f"S2A_MSIL2A_20220611T101559_N{baseline}_R065_T32TQM_20220611T163459.SAFE"
    granule = product / "GRANULE" / "L2A_T32TQM_A036398_20220611T101559"
    stored = {}
    for metres in (10, 20, 60):
        folder = granule / "IMG_DATA" / f"R{metres}m"
        folder.mkdir(parents=True)
        size = rows * 10 // metres
        for number, (band, finest) in enumerate(bands.items()):
            if finest > metres:
                continue
            values = numbers(reflectances(size, size, number, dark=dark, bright=bright), add)
            values[:2, : size // 3] = 0
            if finest == metres:
                stored[band] = values
            _write(folder / f"{TILE}_{band}_{metres}m.{suffix}", values, metres)
        _write(folder / f"{TILE}_AOT_{metres}m.{suffix}", numbers(reflectances(size, size, 77)), metres)
        _write(folder / f"{TILE}_TCI_{metres}m.{suffix}", np.full((3, size, size), 9, np.uint8), metres)
    (granule / "QI_DATA").mkdir()
    _write(granule / "QI_DATA" / f"MSK_CLDPRB_20m.{suffix}", np.full((rows // 2, rows // 2), 9, np.uint8), 20)
    (granule / "MTD_TL.xml").write_text("<tile/>")
    if xml is not None:
        number = f"{baseline[:2]}.{baseline[2:]}"
        text = metadata("L2A", number, add if add else None) if xml.startswith("as ") else xml
        (product / "MTD_MSIL2A.xml").write_text(text)
    return product, stored


def safe_l1c(
    root: Path, *, baseline: str = "0301", add: float = 0, rows: int = 120
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a Level-1C product: all bands in one folder. Returns its folder and the stored numbers."""
    product = root / f"S2B_MSIL1C_20210611T101559_N{baseline}_R065_T32TQM_20210611T121906.SAFE"
    folder = product / "GRANULE" / "L1C_T32TQM_A022285_20210611T101559" / "IMG_DATA"
    folder.mkdir(parents=True)
    stored = {}
    for number, (band, metres) in enumerate(L1C_METRES.items()):
        size = rows * 10 // metres
        stored[band] = numbers(reflectances(size, size, number, dark=0.001 if band == "B10" else 0.03), add)
        _write(folder / f"{TILE}_{band}.jp2", stored[band], metres)
    _write(folder / f"{TILE}_TCI.jp2", np.full((3, rows, rows), 9, np.uint8), 10)
    number = f"{baseline[:2]}.{baseline[2:]}"
    (product / "MTD_MSIL1C.xml").write_text(metadata("L1C", number, add if add else None))
    return product, stored


def landsat_product(
    root: Path, name: str = "LC08_L2SP_193026_20220611_20220616_02_T1"
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a Landsat 8 Collection 2 Level-2 product whose fill shows in QA_PIXEL alone; return it and its numbers."""
    folder = root / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    stored = {}
    for band in ("SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7", "ST_B10"):
        stored[band] = rng.integers(7300, 20000, (40, 50)).astype(np.uint16)
        write_geotiff(folder / f"{name}_{band}.TIF", stored[band], transform=grid(30))
    flags = np.full((40, 50), 21824, np.uint16)
    flags[:, :7] = 1
    stored["QA_PIXEL"] = flags
    write_geotiff(folder / f"{name}_QA_PIXEL.TIF", flags, transform=grid(30), nodata=1)
    for other in ("QA_RADSAT", "SR_QA_AEROSOL", "ST_QA", "ST_TRAD"):
        write_geotiff(folder / f"{name}_{other}.TIF", flags, transform=grid(30))
    for text in ("MTL.txt", "MTL.json", "MTL.xml", "ANG.txt"):
        (folder / f"{name}_{text}").write_text("metadata")
    return folder, stored


def _write(path: Path, array: np.ndarray, metres: float) -> None:
    if path.suffix == ".jp2":
        write_jp2(path, array, transform=grid(metres))
    else:
        write_geotiff(path, array, transform=grid(metres), crs="EPSG:32632")
