"""The command line: a table of contents. Each command parses its options and calls the verb of the same name.

Human text and progress go to stderr; the result (a path or a JSON object) goes to stdout. Exit codes: 0 ok, 1 bug,
2 usage or config, 3 too many bad inputs, 4 output I/O, 5 integrity, 6 leakage, 7 security refusal, 8 numerical failure,
75 preempted (saved, requeue). Verbs are imported inside their command, so that `--help` loads neither torch nor
readers.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click

from geomed_mae.errors import GeomedError, OutputError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it (128 + SIGINT)."""


class Commands(click.Group):
    """The group: turns errors into one sentence on stderr and the exit code of their class."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the work, not of the alphabet."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and exit with the code that the error tree gives."""
        try:
            return super().main(*args, **kwargs)
        except GeomedError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            click.echo(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True)
            sys.exit(OutputError.exit_code)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception:
            traceback.print_exc()
            click.echo("error: this is a bug in geomed-mae; please report it with the lines above", err=True)
            sys.exit(GeomedError.exit_code)


class Command(click.Command):
    """A command whose `--archive` takes several values after one flag, as shell patterns give them."""

    MANY = "--archive"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, as click wants it."""
        repeated: list[str] = []
        inside = False
        for before, arg in zip(["", *args], args, strict=False):
            if arg.startswith("-"):
                inside = arg == self.MANY
            elif inside and before != self.MANY:
                repeated.append(self.MANY)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


EXISTING = click.Path(exists=True, path_type=Path)
ANY_PATH = click.Path(path_type=Path)

archive_option = click.option(
    "--archive", "archives", type=EXISTING, multiple=True, required=True, help="Raw files and folders, or an INDEX."
)
labels_option = click.option("--labels", type=EXISTING, required=True, help="Label files: a file or a folder.")
modality_option = click.option(
    "--modality", multiple=True, default=("auto",), show_default=True, help="Modality names or YAML files, or auto."
)
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
resume_option = click.option("--resume", is_flag=True, help="Continue the run in --out.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
transductive_option = click.option(
    "--transductive", is_flag=True, help="Allow, and record, that the encoder has seen test images without labels."
)


SPLIT_OPTIONS = ("split", "split_shares", "split_seed", "block_km", "buffer_km", "exclude_unlocated")


class Fraction(click.ParamType):
    """A share, written 1% or 0.01."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number from 0 to 1."""
        try:
            text = str(value)
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"'{value}' is not a share such as 1% or 0.01", param, ctx)
        return share


split_option = click.option("--split", metavar="PART", help="Use this part of an INDEX's stored split alone.")
channels_option = click.option("--channels", metavar="LIST", help="Channels to use: B08,B12; default: all.")


def _progress(items: Iterable, what: str, total: int) -> Iterable:
    from tqdm import tqdm  # loads a tenth of a second of machinery

    # A log file gets a line now and then, not a picture drawn over itself.
    every = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, total=total, file=sys.stderr, mininterval=every, leave=False, disable=total < 2)


def _print(result: Any) -> None:
    click.echo(str(result) if isinstance(result, Path) else json.dumps(result, indent=2))


def command(example: str) -> Callable[[Callable], click.Command]:
    """Register a command; its help ends with a working example."""

    def register(function: Callable) -> click.Command:
        function.__doc__ = f"{cleandoc(function.__doc__ or '')}\n\nExample:\n\n\b\n    {example}"
        return main.command(cls=Command)(function)

    return register


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="geomed-mae")
@click.option("-v", "--verbose", count=True, help="More log lines on stderr.")
def main(verbose: int) -> None:
    """Turn an unlabelled archive of raw satellite or medical images into a pretrained encoder, and use it.

    Start with: geomed-mae demo
    """
    level = logging.WARNING - 10 * min(verbose, 2)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(message)s")
    for other in ("matplotlib", "PIL"):  # their debugging is about fonts, and names folders
        logging.getLogger(other).setLevel(logging.WARNING)


@command("geomed-mae doctor")
def doctor() -> None:
    """Check that this machine has what the work needs."""
    from geomed_mae.doctor import doctor as verb

    report = verb()
    for problem in report["problems"] or ["no problems found"]:
        click.echo(problem, err=True)
    _print(report)


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
    index = verb(archives, out, workers=workers, progress=_progress, **how)
    click.echo(index.ledger.summary(), err=True)
    _print(out)


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


@command("geomed-mae pretrain pretrain_landsat7_tiny --archive index/ --out runs/a --set data.split=train")
@click.argument("recipe", type=ANY_PATH)
@archive_option
@click.option("--labels", type=EXISTING, help="Labels to probe features with meanwhile; they never influence training.")
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the run.")
@set_option
@resume_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Say what would be done and needed; write nothing.")
def pretrain(recipe: Path, archives: Sequence[Path], out: Path, overrides: Sequence[str], **how: Any) -> None:
    """Pretrain a masked autoencoder on an archive."""
    from geomed_mae.pretrain import pretrain as verb
    from geomed_mae.recipe_file import load_recipe

    if result := verb(load_recipe(recipe, list(overrides)), archives, out, progress=_progress, **how):
        if how["dry_run"]:
            from geomed_mae.training.plan_text import plan_as_text

            click.echo(plan_as_text(result), err=True)
        _print(result)  # one of several processes has it


@command(
    "geomed-mae finetune finetune_landsat7_water --archive index/ --labels masks/ --encoder runs/a --out runs/b "
    "--set labels.block_px=null"
)
@click.argument("recipe", type=ANY_PATH)
@archive_option
@labels_option
@click.option("--encoder", required=True, help="Encoder folder, pretraining run, or none for random weights.")
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the run.")
@click.option("--label-fraction", type=Fraction(), help="Use so large a share of the training patients or scenes: 10%.")
@click.option("--shots", type=click.IntRange(1), help="Use so many training patients or scenes, or images of a class.")
@click.option("--seeds", type=click.IntRange(1), help="Do so many runs, each with another seed.")
@click.option("--twin", is_flag=True, help="Do the same from random weights, and say whether pretraining paid.")
@transductive_option
@set_option
@resume_option
@overwrite_option
def finetune(
    recipe: Path, archives: Sequence[Path], labels: Path, encoder: str, out: Path, overrides: Sequence[str], **how: Any
) -> None:
    """Train a head, and the encoder under it, from labels; score it on patients or scenes that were held out."""
    from geomed_mae.finetune import finetune as verb
    from geomed_mae.recipe_file import load_recipe

    options = [*overrides, *_few_labels(how.pop("shots"), how.pop("label_fraction"))]
    if (seeds := how.pop("seeds")) is not None:
        options.append(f"train.seeds={seeds}")
    _print(verb(load_recipe(recipe, options), archives, labels, encoder, out, progress=_progress, **how))


def _few_labels(shots: int | None, fraction: float | None) -> list[str]:
    """Return recipe keys; an option replaces what the recipe says, in whichever of the two ways it says it."""
    if shots is None and fraction is None:
        return []
    given = {"labels.shots": shots, "labels.fraction": fraction}
    return [f"{key}={'null' if value is None else value}" for key, value in given.items()]


@command("geomed-mae evaluate runs/b --archive test_scenes/ --labels test_masks/ --out scores.json")
@click.argument("run", type=EXISTING)
@archive_option
@labels_option
@click.option("--out", type=ANY_PATH, required=True, help="JSON file for the scores.")
@click.option("--split", metavar="PART", help="Score this part of the INDEX's stored split alone, for example test.")
@transductive_option
@click.option("--buffer-km", type=click.FloatRange(0), help="Smallest distance to ground that the model has seen.")
@click.option("--pictures/--no-pictures", default=True, help="Draw confusion, calibration and worst cases beside FILE.")
def evaluate(run: Path, archives: Sequence[Path], labels: Path, out: Path, **how: Any) -> None:
    """Score a fine-tuned run, or a study of several, on images that it has not seen."""
    from geomed_mae.evaluate import evaluate as verb
    from geomed_mae.evaluate import without_lists

    _print(without_lists(verb(run, archives, labels, out, progress=_progress, **how)))


@command("geomed-mae probe runs/a --archive index/ --labels masks/ --out probe.json")
@click.argument("encoder", type=EXISTING)
@archive_option
@click.option("--labels", type=EXISTING, required=True, help="Label maps, a CSV table of classes, or a folder of them.")
@click.option("--out", type=ANY_PATH, required=True, help="JSON file for the scores.")
@split_option
@channels_option
@click.option("--shots", metavar="LIST", help="Also score few labels: 8,16,32.")
@transductive_option
@set_option
def probe(
    encoder: Path, archives: Sequence[Path], labels: Path, out: Path, overrides: Sequence[str], **how: Any
) -> None:
    """Score frozen features beside the floors that any encoder must beat.

    --set takes the recipe keys of `labels`, for example labels.test=0.3, and head.classes.
    """
    from geomed_mae.probe import probe as verb
    from geomed_mae.probe import probe_recipe

    _print(verb(encoder, archives, labels, out, recipe=probe_recipe(overrides), progress=_progress, **how))


@command("geomed-mae predict runs/b --archive scenes/ --out maps/")
@click.argument("run", type=EXISTING)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the predictions.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "cog", "nifti", "dicom-seg"]),
    default="auto",
    show_default=True,
    help="auto: cog for rasters, nifti for volumes. dicom-seg is not available yet.",
)
@split_option
def predict(run: Path, archives: Sequence[Path], out: Path, form: str, split: str | None) -> None:
    """Segment whole scenes and volumes, on the grid of the input."""
    from geomed_mae.predict import predict as verb

    _print(verb(run, archives, out, format=form, split=split, progress=_progress))


@command("geomed-mae embed runs/a --archive scenes/ --out vectors/")
@click.argument("encoder", type=EXISTING)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the embeddings.")
@click.option("--dense", is_flag=True, help="Also the token grid of each image, with coordinates.")
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
    """Write one vector an image."""
    from geomed_mae.embed import embed as verb

    _print(verb(encoder, archives, out, progress=_progress, **how))


@command("geomed-mae reconstruct runs/a --archive scenes/ --out panel.png")
@click.argument("run", type=EXISTING)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="PNG file.")
def reconstruct(run: Path, archives: Sequence[Path], out: Path) -> None:
    """Draw what the autoencoder makes of masked images."""
    from geomed_mae.reconstruct import reconstruct as verb

    _print(verb(run, archives, out))


@command("geomed-mae export runs/a --to timm --out exported/ --channels B3,B2,B1 --size 224,224")
@click.argument("source", metavar="RUN|ENC", type=EXISTING)
@click.option("--to", "target", required=True, help="Target format, for example timm.")
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the export.")
@click.option("--modality", help="Modality whose channels are exported; needed if the encoder has several.")
@click.option("--channels", help="Channel names, comma-separated; default: all of the modality.")
@click.option("--size", help="Input size in pixels, comma-separated; default: the pretraining crop.")
@click.option("--spacing", help="Metres or mm between pixels per axis, if positions are physical; default: reference.")
def export(source: Path, target: str, out: Path, **options: str) -> None:
    """Convert an encoder for another tool, and prove that it computes the same."""
    from geomed_mae.export import export as verb

    _print(verb(source, target, out, **options))


@command("geomed-mae report runs/a")
@click.argument("run", type=EXISTING)
def report(run: Path) -> None:
    """Write the run's report.html, one self-contained file."""
    from geomed_mae.report import report as verb

    _print(verb(run))


@command("geomed-mae demo --out demo")
@click.option("--out", type=ANY_PATH, default=Path("demo"), show_default=True, help="Folder for everything it makes.")
def demo(out: Path) -> None:
    """Do the main job on real images that travel with the package, in a few minutes on a CPU."""
    from geomed_mae.demo import demo as verb

    _print(verb(out, say=lambda text: click.echo(text, err=True), progress=_progress))
