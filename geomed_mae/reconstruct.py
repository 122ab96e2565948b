"""The verb reconstruct: a pretraining run + images -> a picture of what the autoencoder makes of them, masked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import keep_apart, open_archive
from geomed_mae.archives.planes import sides
from geomed_mae.errors import ConfigError
from geomed_mae.recipe_file import load_recipe
from geomed_mae.samples.loader import Steps
from geomed_mae.training.checkpoint import newest_valid
from geomed_mae.training.objective import restore_objective
from geomed_mae.training.panels import CANDIDATES, draw_reconstructions
from geomed_mae.training.run import RECIPE, is_run


def reconstruct(run: str | Path, archive_paths: Sequence[str | Path], out_png: str | Path) -> dict[str, Any]:
    """Mask images, let the run's newest autoencoder fill them in, and draw the result.

    Args:
        run: a pretraining run, finished or not; its checkpoint has the decoder, which the encoder folder has not.
        archive_paths: raw files and folders, or one index folder.
        out_png: the picture; images of further modalities or channel lists go to `<name>-2.png` and so on.

    Returns:
        `panels` (files), `step` of the checkpoint, and `error` of each panel's channels over hidden patches (see
        `training.panels.error_summary`).

    Raises:
        ConfigError: `run` is no pretraining run with a checkpoint, or the model does not know the images' channels.
        IntegrityError: no checkpoint verifies. OutputError: the picture cannot be written.
    """
    run, out = Path(run), Path(out_png)
    if not is_run(run):
        raise ConfigError(f"'{run}' is no run: it has no {RECIPE}")
    recipe = load_recipe(run / RECIPE)
    if recipe.head is not None:
        raise ConfigError(f"'{run}' is a fine-tuning run, which has no decoder; give the pretraining run")
    checkpoint = newest_valid(run / "checkpoints")
    if checkpoint is None:
        raise ConfigError(
            f"the run '{run}' has no checkpoint yet; wait for its first, or set train.checkpoint_every lower"
        )
    objective = restore_objective(checkpoint)
    keep_apart(out_png, archive_paths)
    index = open_archive(archive_paths, recipe.data.modality)
    steps = Steps(index, recipe.data, seed=recipe.train.seed, batch_size=recipe.train.batch_size)
    files, errors = [], {}
    for number, bucket in enumerate(steps.buckets, start=1):
        path = out if number == 1 else out.with_name(f"{out.stem}-{number}{out.suffix or '.png'}")
        batch = steps.examples(bucket, CANDIDATES)
        turned = sides({key: index.outline(key).geometry for key in batch.keys})
        errors[path.name] = draw_reconstructions(objective, batch, path, sides=turned)
        files.append(str(path))
    return {"panels": files, "step": checkpoint.step, "error": errors}
