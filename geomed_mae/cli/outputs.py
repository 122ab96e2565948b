"""Commands that put a model to use: maps, vectors, and files for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from geomed_mae.cli.group import command, progress, show
from geomed_mae.cli.options import ANY_PATH, EXISTING, Pixel, archive_option, channels_option, split_option


@command("geomed-mae predict runs/b --archive scenes/ --out maps/")
@click.argument("run", type=EXISTING)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the predictions.")
@click.option(
    "--format",
    "form",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="auto: cog for rasters, nifti for the others. dicom-seg: of DICOM images; holds their patient and study.",
)
@click.option("--probabilities", is_flag=True, help="Also write the probability of every class.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Windows computed at a time.")
@click.option("--overwrite", is_flag=True, help="Compute everything anew, also what an earlier call has finished.")
@split_option
def predict(run: Path, archives: Sequence[Path], out: Path, form: str, **how: Any) -> None:
    """Segment, or classify, whole scenes and volumes of any size, on the grid of the input.

    The same call again goes on where an interrupted one was. Start it with torchrun to share the work.
    """
    from geomed_mae.predict import predict as verb

    told = verb(run, archives, out, format=form, progress=progress, **how)
    if told:  # one of several processes tells
        show(told)


@command("geomed-mae embed runs/a --archive scenes/ --out vectors/ --tile 256")
@click.argument("encoder", type=EXISTING)
@click.option("--archive", "archives", type=EXISTING, multiple=True, help="Raw files and folders, or an INDEX.")
@click.option(
    "--out",
    type=ANY_PATH,
    required=True,
    help="Folder for the embeddings, or with --search alone the one that has them.",
)
@click.option("--tile", type=click.IntRange(1), metavar="PX", help="One vector a tile of so many pixels, not an image.")
@click.option("--dense", is_flag=True, help="Also the token grid of each image, with coordinates.")
@click.option(
    "--dtype",
    type=click.Choice(["int8", "float32", "float16"]),
    default="int8",
    show_default=True,
    help="Numbers of a raster's token grid; int8 has a scale and an offset a band.",
)
@click.option("--preview/--no-preview", default=None, help="Pictures of the token grids; default: with --dense.")
@click.option("--search", type=EXISTING, metavar="IMAGE", help="Say what in the table is most like this image.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="How many --search says.")
@click.option("--at", type=Pixel(), help="Search with the tile around this pixel of IMAGE alone.")
@click.option(
    "--read-out",
    type=click.Choice(["last", "several"]),
    default="last",
    show_default=True,
    help="last: the last block. several: three blocks side by side, which tell more at three times the width.",
)
@split_option
@channels_option
def embed(encoder: Path, archives: Sequence[Path], out: Path, **how: Any) -> None:
    """Write one vector an image or tile; or search in what was written.

    With --search and without --archive, the table in --out is searched as it is.
    """
    from geomed_mae.embed import embed as verb
    from geomed_mae.embed import search

    query, top, at = how.pop("search"), how.pop("top"), how.pop("at")
    if not archives and query is None:
        raise click.UsageError("give --archive to write embeddings, --search to search in those of --out, or both")
    result = verb(encoder, archives, out, progress=progress, **how) if archives else {}
    found = {} if query is None else {"search": search(encoder, out, query, top=top, at=at)}
    show({**result, **found})


@command("geomed-mae export runs/a --to timm --out exported/ --channels B3,B2,B1 --size 224,224")
@click.argument("source", metavar="RUN|ENC", type=EXISTING)
@click.option(
    "--to",
    "target",
    required=True,
    help="Target: timm, hf-vitmae, onnx, onnx-qgis, torch, monai-bundle, torchgeo, stac-mlm or native.",
)
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the export; must not hold anything yet.")
@click.option("--modality", help="Modality whose channels are exported; needed if the encoder has several.")
@click.option("--channels", help="Channel names, comma-separated; default: all of the modality.")
@click.option("--size", help="Input size in pixels, for example 224,224; default: the crop of training.")
@click.option("--spacing", help="Metres or mm between pixels per axis, if positions are physical; default: reference.")
@click.option("--image", type=EXISTING, help="Image to compare on; default: a scene that travels with the package.")
@click.option("--decoder", is_flag=True, help="Also the decoder of a pretraining run (hf-vitmae, native).")
def export(source: Path, target: str, out: Path, **options: Any) -> None:
    """Convert an encoder or a fine-tuned model for another tool, and prove that it computes the same.

    What was written is opened again in its own runtime and compared on a real image; where it differs, nothing is left
    and the exit code is 5.
    """
    from geomed_mae.export import export as verb

    show(verb(source, target, out, **options))
