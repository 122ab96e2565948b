"""The command line: a table of contents. Each command parses its options and calls the verb of the same name.

Human text and progress go to stderr; the result (a path or a JSON object) goes to stdout. Exit codes: 0 ok, 1 bug,
2 usage or config, 3 too many bad inputs, 4 output I/O, 5 integrity, 6 leakage, 7 security refusal, 8 numerical failure,
75 preempted (saved, requeue). Verbs are imported inside their command, so that `--help` loads neither torch nor
readers.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
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


def _progress(items: Iterable, what: str, total: int) -> Iterable:
    from tqdm import tqdm  # loads a tenth of a second of machinery

    return tqdm(items, desc=what, total=total, file=sys.stderr, mininterval=0.5, leave=False, disable=total < 2)


def _print(result: Any) -> None:
    click.echo(str(result) if isinstance(result, Path) else json.dumps(result, indent=2))


def command(example: str) -> Callable[[Callable], click.Command]:
    """Register a command; its help ends with a working example."""

    def register(function: Callable) -> click.Command:
        function.__doc__ = f"{function.__doc__}\n\nExample:\n\n\b\n    {example}"
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


@command("geomed-mae doctor")
def doctor() -> None:
    """Check that this machine has what the work needs."""
    from geomed_mae.doctor import doctor as verb

    report = verb()
    for problem in report["problems"] or ["no problems found"]:
        click.echo(problem, err=True)
    _print(report)


@command("geomed-mae scan scenes/ --out index/ --modality landsat7")
@click.argument("archives", metavar="ARCHIVE...", nargs=-1, required=True, type=EXISTING)
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the index.")
@modality_option
@click.option("--workers", default=1, show_default=True, help="Processes.")
@click.option("--dask", metavar="URL", help="Address of a Dask scheduler (not available yet).")
@click.option("--max-bad", type=Fraction(), default="1%", show_default=True, help="Largest share of bad files.")
def scan(archives: Sequence[Path], out: Path, modality: Sequence[str], workers: int, dask: str, max_bad: float) -> None:
    """Look at every file of an archive and write an index: images, statistics, and a line on each file."""
    from geomed_mae.scan import scan as verb

    if dask:
        raise click.UsageError("--dask is not available yet; use --workers")
    index = verb(archives, out, modality=modality, workers=workers, max_bad=max_bad, progress=_progress)
    click.echo(index.ledger.summary(), err=True)
    _print(out)


@command("geomed-mae inspect scene.tif")
@click.argument("path", type=EXISTING)
@click.option("--modality", default="auto", show_default=True, help="Modality name or YAML file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, modality: str, as_json: bool) -> None:
    """Show what is in a file or folder: geometry, channels, values."""
    from geomed_mae.inspect import as_text
    from geomed_mae.inspect import inspect as verb

    found = verb(path, modality)
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))


@command("geomed-mae pretrain pretrain_landsat7_tiny --archive scenes/ --out runs/a --set train.steps=50")
@click.argument("recipe", type=ANY_PATH)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the run.")
@set_option
@resume_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Say what would be done and needed; write nothing.")
def pretrain(recipe: Path, archives: Sequence[Path], out: Path, overrides: Sequence[str], **how: bool) -> None:
    """Pretrain a masked autoencoder on an archive."""
    from geomed_mae.config import load_recipe
    from geomed_mae.pretrain import pretrain as verb

    _print(verb(load_recipe(recipe, list(overrides)), archives, out, progress=_progress, **how))


@command("geomed-mae finetune finetune_landsat7_water --archive scenes/ --labels masks/ --encoder runs/a --out runs/b")
@click.argument("recipe", type=ANY_PATH)
@archive_option
@labels_option
@click.option("--encoder", required=True, help="Encoder folder, pretraining run, or none for random weights.")
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the run.")
@set_option
@resume_option
@overwrite_option
def finetune(
    recipe: Path, archives: Sequence[Path], labels: Path, encoder: str, out: Path, overrides: Sequence[str], **how: bool
) -> None:
    """Train a segmentation head, and the encoder under it, from labels."""
    from geomed_mae.config import load_recipe
    from geomed_mae.finetune import finetune as verb

    _print(verb(load_recipe(recipe, list(overrides)), archives, labels, encoder, out, **how))


@command("geomed-mae evaluate runs/b --archive test_scenes/ --labels test_masks/ --out scores.json")
@click.argument("run", type=EXISTING)
@archive_option
@labels_option
@click.option("--out", type=ANY_PATH, required=True, help="JSON file for the scores.")
def evaluate(run: Path, archives: Sequence[Path], labels: Path, out: Path) -> None:
    """Score a fine-tuned run on images that it has not seen."""
    from geomed_mae.evaluate import evaluate as verb

    _print(verb(run, archives, labels, out, progress=_progress))


@command("geomed-mae probe runs/a --archive scenes/ --labels masks/ --out probe.json")
@click.argument("encoder", type=EXISTING)
@archive_option
@labels_option
@click.option("--out", type=ANY_PATH, required=True, help="JSON file for the scores.")
def probe(encoder: Path, archives: Sequence[Path], labels: Path, out: Path) -> None:
    """Score frozen features beside the floors that any encoder must beat."""
    from geomed_mae.probe import probe as verb

    _print(verb(encoder, archives, labels, out, progress=_progress))


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
def predict(run: Path, archives: Sequence[Path], out: Path, form: str) -> None:
    """Segment whole scenes and volumes, on the grid of the input."""
    from geomed_mae.predict import predict as verb

    _print(verb(run, archives, out, format=form, progress=_progress))


@command("geomed-mae embed runs/a --archive scenes/ --out vectors/")
@click.argument("encoder", type=EXISTING)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="Folder for the embeddings.")
@click.option("--dense", is_flag=True, help="Also the token grid of each image, with coordinates.")
def embed(encoder: Path, archives: Sequence[Path], out: Path, dense: bool) -> None:
    """Write one vector an image."""
    from geomed_mae.embed import embed as verb

    _print(verb(encoder, archives, out, dense=dense, progress=_progress))


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
def export(source: Path, target: str, out: Path, modality: str, channels: str, size: str) -> None:
    """Convert an encoder for another tool, and prove that it computes the same."""
    from geomed_mae.export import export as verb

    _print(verb(source, target, out, modality=modality, channels=channels, size=size))


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
