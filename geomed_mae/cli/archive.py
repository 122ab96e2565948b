"""Commands that look: at this machine, at an archive, at a file; and the demonstration."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from geomed_mae.cli.group import command, progress, show
from geomed_mae.cli.options import ANY_PATH, EXISTING, Fraction, modality_option

SPLIT_OPTIONS = ("split", "split_shares", "split_seed", "block_km", "buffer_km", "exclude_unlocated")


@command("geomed-mae doctor")
def doctor() -> None:
    """Check that this machine has what the work needs."""
    from geomed_mae.doctor import doctor as verb

    report = verb()
    for problem in report["problems"] or ["no problems found"]:
        click.echo(problem, err=True)
    show(report)


@command("geomed-mae scan scenes/ --out index/ --modality landsat7 --split group")
@click.argument("archives", metavar="ARCHIVE...", nargs=-1, required=True, type=EXISTING)
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the index.")
@modality_option
@click.option("--workers", type=click.IntRange(1), help="Decoding processes; default: one for each core, at most 16.")
@click.option("--dask", metavar="URL", help="Address of a Dask scheduler, whose workers do the work instead.")
@click.option("--verify", is_flag=True, help="Decode everything again and compare with the last scan into --out.")
@click.option("--max-bad", type=Fraction(), default="1%", show_default=True, help="Largest share of bad files.")
@click.option("--split", type=click.Choice(["group", "block"]), help="Split by patient or scene, or by spatial blocks.")
@click.option("--split-shares", metavar="LIST", help="80,10,10 (default) or 80,20, or names: train=80,test=20.")
@click.option("--split-seed", type=int, help="Another seed, another split; default 0.")
@click.option("--block-km", type=click.FloatRange(0.001), help="Side of a block; default 10.")
@click.option("--buffer-km", type=click.FloatRange(0), help="Smallest distance between parts; default 2.")
@click.option("--exclude-unlocated", is_flag=True, help="Leave images without a place out of a block split.")
@click.option("--pictures/--no-pictures", default=True, help="Draw pictures beside the card; they show pixels.")
def scan(archives: Sequence[Path], out: Path, workers: int | None, **how: Any) -> None:
    """Look at every file of an archive and write an index: images, statistics, and a line on each file.

    A scan that was stopped goes on where it was; a second one reads only what is new or has changed, and keeps the
    split.
    """
    from geomed_mae.archives.splits import requested
    from geomed_mae.scan import scan as verb

    options = {name: how.pop(name) for name in SPLIT_OPTIONS}
    how["split"] = requested(**options)

    workers = workers or min(len(os.sched_getaffinity(0)), 16)
    index = verb(archives, out, workers=workers, progress=progress, **how)
    click.echo(index.ledger.summary(), err=True)
    show(out)


@command("geomed-mae inspect scene.tif --picture scene.png")
@click.argument("path", type=EXISTING)
@click.option("--modality", default="auto", show_default=True, help="Modality name or YAML file.")
@click.option("--image", "only", type=int, metavar="N", help="Describe this image in full, counted from 1.")
@click.option("--all", "full", is_flag=True, help="Describe all images in full; otherwise only up to four.")
@click.option("--picture", type=ANY_PATH, help="Also write a PNG of the images described in full.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, modality: str, picture: Path | None, as_json: bool, **which: Any) -> None:
    """Show what is in a file, a folder or an INDEX: geometry, channels, values, a thumbnail."""
    from geomed_mae import inspect as verb

    if verb.is_index(path):
        if picture or any(which.values()):
            raise click.UsageError("an INDEX is summed up; --image, --all and --picture need raw files")
        found = verb.describe_index(path)
        click.echo(json.dumps(found, indent=2) if as_json else verb.index_as_text(found))
        return
    seen = verb.look_into(path, modality, **which)
    if picture:
        click.echo(f"picture: {verb.save_picture(seen, picture)}", err=True)
    click.echo(json.dumps(list(seen.images), indent=2) if as_json else verb.as_text(seen))


@command("geomed-mae demo --out demo")
@click.option("--out", type=ANY_PATH, default=Path("demo"), show_default=True, help="Folder for everything it makes.")
def demo(out: Path) -> None:
    """Do the main job on real images that travel with the package, in a few minutes on a CPU."""
    from geomed_mae.demo import demo as verb

    show(verb(out, say=lambda text: click.echo(text, err=True), progress=progress))
