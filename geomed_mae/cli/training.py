"""Commands that train, score and look at what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from geomed_mae.cli.group import command, progress, show
from geomed_mae.cli.options import (
    ANY_PATH,
    EXISTING,
    Fraction,
    archive_option,
    channels_option,
    labels_option,
    overwrite_option,
    resume_option,
    set_option,
    split_option,
    transductive_option,
)


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

    if result := verb(load_recipe(recipe, list(overrides)), archives, out, progress=progress, **how):
        if how["dry_run"]:
            from geomed_mae.training.plan_text import plan_as_text

            click.echo(plan_as_text(result), err=True)
        show(result)  # one of several processes has it


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
    show(verb(load_recipe(recipe, options), archives, labels, encoder, out, progress=progress, **how))


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

    show(without_lists(verb(run, archives, labels, out, progress=progress, **how)))


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

    show(verb(encoder, archives, labels, out, recipe=probe_recipe(overrides), progress=progress, **how))


@command("geomed-mae reconstruct runs/a --archive scenes/ --out panel.png")
@click.argument("run", type=EXISTING)
@archive_option
@click.option("--out", type=ANY_PATH, required=True, help="PNG file.")
def reconstruct(run: Path, archives: Sequence[Path], out: Path) -> None:
    """Draw what the autoencoder makes of masked images."""
    from geomed_mae.reconstruct import reconstruct as verb

    show(verb(run, archives, out))


@command("geomed-mae report runs/a")
@click.argument("run", type=EXISTING)
def report(run: Path) -> None:
    """Write the run's report.html, one self-contained file."""
    from geomed_mae.report import report as verb

    show(verb(run))
