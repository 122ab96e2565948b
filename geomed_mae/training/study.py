"""A study: the same fine-tuning run with several seeds, and from random weights beside pretrained ones.

    OUT/pretrained/seed-0 ...   members, each an ordinary run folder
    OUT/scratch/seed-0 ...      their twins: the same model from random weights, same seeds, steps, batches, images
    OUT/recipe.resolved.yaml    of all of them; members differ in train.seed
    OUT/study.json              what was planned, from which data and encoder: the mark of a study
    OUT/summary.json            both arms, their paired difference, the verdict; only a finished study has it

Members run one after another, seed by seed, both arms of a seed together: a study that is stopped early has whole
pairs. The twin starts with the same architecture; only what protects pretrained weights is dropped (`training.tuning`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError, GeomedError, IntegrityError, OutputError
from geomed_mae.recipe_file import dump_recipe, load_recipe
from geomed_mae.scoring.stored import FILE as SCORES
from geomed_mae.scoring.stored import load_scores
from geomed_mae.training.comparison import ARMS, PRETRAINED, SCRATCH, Member, compare, unit_of
from geomed_mae.training.downstream import SCRATCH as RANDOM
from geomed_mae.training.downstream import as_twin, identity_of
from geomed_mae.training.run import LOCK, RECIPE, SUMMARY, is_run, science_differences, write_json
from geomed_mae.training.study_files import STUDY, is_study, members, read_record
from geomed_mae.training.task import Task

REPORT = "report.html"
FILES = (RECIPE, STUDY, SUMMARY, REPORT, LOCK)
ALIKE = ("validate_every", "patience")
"""Keys of `train` that a run may change when it goes on and a study may not: they decide which weights are scored, and
members that differ in them cannot be compared."""


class Tune(Protocol):
    """One run into one folder: `training.tuning.tune`."""

    def __call__(
        self,
        recipe: Recipe,
        task: Task,
        encoder: str,
        out: Path,
        *,
        twin_of: str | None,
        transductive: bool,
        resume: bool,
        overwrite: bool,
    ) -> dict[str, Any]:
        """Train and score; write the run folder."""


class Check(Protocol):
    """Refuses a run that cannot be done, and writes nothing: `training.tuning.ready`."""

    def __call__(self, recipe: Recipe, task: Task, encoder: str, *, transductive: bool) -> Any:
        """Open the encoder, draw the labels, look for leaks."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A member that is to be: its recipe has its seed."""

    arm: str
    recipe: Recipe
    encoder: str
    twin_of: str | None

    @property
    def seed(self) -> int:
        """Seed of the member."""
        return self.recipe.train.seed

    @property
    def folder(self) -> str:
        """Its folder in the study."""
        return f"{self.arm}/seed-{self.seed}"


def run_study(
    recipe: Recipe,
    task: Task,
    encoder: str,
    out: str | Path,
    *,
    twin: bool,
    transductive: bool,
    resume: bool,
    overwrite: bool,
    tune: Tune,
    check: Check | None = None,
) -> dict[str, Any]:
    """Run all members that are not finished, compare them, write the study's summary and return it.

    Args:
        recipe: train.seeds members with the seeds train.seed, train.seed + 1, ...
        task: images and labels, of which members draw the few that the recipe asks for.
        encoder: folder of the encoder, or "none" for random weights (then there is nothing to compare with).
        out: study folder.
        twin: run each member from random weights too.
        transductive: the encoder may have seen test images, without their labels.
        resume: go on with a study; finished members are kept as they are. More seeds than before are added.
        overwrite: delete the study that is there.
        tune: makes one member.
        check: is asked about the members of every seed before anything is written or deleted.

    Raises:
        ConfigError: there is nothing to compare, or `out` holds something already.
        IntegrityError: the study was made with another recipe, encoder or archive.
        OutputError: the folder cannot be written, or another process writes to it.
        as `check` and `tune` raise; what is finished stays, and `resume` goes on.
    """
    out = Path(out)
    plan = _plan(recipe, task, encoder, twin)
    record = {
        "arms": [arm for arm in ARMS if any(one.arm == arm for one in plan)],
        "seeds": sorted({one.seed for one in plan}),
        "fingerprint": task.fingerprint,
        "encoder": identity_of(encoder),
        "transductive": transductive,
    }

    def checked() -> None:
        # The labels of a later seed may lack a class: hours of the seeds before would be for nothing. Twins share them.
        for one in plan:
            if check is not None and one.twin_of is None:
                check(one.recipe, task, one.encoder, transductive=transductive)

    with _opened(out, recipe, record, checked, resume=resume, overwrite=overwrite):
        for one in plan:
            if not _is_finished(out, one):
                tune(
                    one.recipe,
                    task,
                    one.encoder,
                    out / one.folder,
                    twin_of=one.twin_of,
                    transductive=transductive,
                    resume=resume,
                    overwrite=False,
                )
        found = [_member(out, one, scored=bool(task.test)) for one in plan]
        summary = compare(found, unit_of(task.index, [row for row, _ in task.test or task.train]))
        write_json(out / SUMMARY, summary)
    return {"run": str(out), **summary}


def _plan(recipe: Recipe, task: Task, encoder: str, twin: bool) -> list[Planned]:
    if twin and encoder == RANDOM:
        raise ConfigError("--twin compares an encoder with random weights; give --encoder ENC, or leave --twin out")
    if twin and not task.test:
        raise ConfigError(
            "--twin needs images to compare the scores on, and labels.test is 0; hold some out, for example "
            "--set labels.test=0.25"
        )
    plan = []
    for seed in range(recipe.train.seed, recipe.train.seed + recipe.train.seeds):
        train = recipe.train.model_copy(update={"seed": seed, "seeds": 1})
        own = recipe.model_copy(update={"train": train})
        plan.append(Planned(SCRATCH if encoder == RANDOM else PRETRAINED, own, encoder, None))
        if twin:
            plan.append(Planned(SCRATCH, own, RANDOM, encoder))
    return plan


# ---------------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _opened(
    out: Path, recipe: Recipe, record: dict[str, Any], checked: Callable[[], None], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Make or open the study folder and keep other processes out of it; `checked` is called before anything changes."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude one another")
    present = is_study(out)
    if present and not (resume or overwrite):
        raise ConfigError(f"'{out}' already holds a study; continue it with --resume or replace it with --overwrite")
    if not present:
        _check_unused(out)
    elif resume:
        _check_same(out, recipe, record)
    checked()
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((out / LOCK).open("a")), out)
            if present and overwrite:
                _clear(out)
            (out / SUMMARY).unlink(missing_ok=True)
            # Whoever finds the mark of a study finds the recipe too.
            (out / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
            write_json(out / STUDY, record)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"the study folder '{out}' cannot be written: {error.strerror or error}") from error
        try:
            yield
        except GeomedError:
            if not members(out):
                _clear(out)  # nothing has begun: the next try needs neither --resume nor --overwrite
            raise


def _check_unused(out: Path) -> None:
    if is_run(out):
        raise ConfigError(
            f"'{out}' holds a single run, and --twin or train.seeds make a study of several; give another folder"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; --out takes a folder")
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in FILES) if out.exists() else []
    if foreign:
        raise ConfigError(
            f"'{out}' is not empty and holds no study (found '{foreign[0]}'); give a new or an empty folder"
        )


def _lock(file: IO[str], out: Path) -> None:
    # A record lock, which loader workers do not inherit: one that outlives a killed study must not hold it.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OutputError(f"another process is writing the study '{out}'; wait for it or stop it") from None


def _clear(out: Path) -> None:
    for name in FILES:
        if name != LOCK:
            (out / name).unlink(missing_ok=True)
    for arm in ARMS:
        if (out / arm).exists():
            shutil.rmtree(out / arm)


def _check_same(out: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """Refuse to go on with another recipe, other data, another encoder, or fewer members than there are."""
    before = read_record(out)
    try:
        old = load_recipe(out / RECIPE)
    except ConfigError as error:
        raise IntegrityError(f"the study '{out}' is damaged ({error}); start again with --overwrite") from error
    differences = science_differences(old, recipe)
    for name in ALIKE:
        if (then := getattr(old.train, name)) != (now := getattr(recipe.train, name)):
            differences.append(f"train.{name}: {then} -> {now}")
    same = "resume with the same one, or start another study"
    if differences:
        raise IntegrityError(f"the study '{out}' was made with another recipe ({'; '.join(differences)}); {same}")
    if before.get("fingerprint") != record["fingerprint"]:
        raise IntegrityError(f"the study '{out}' was made from other images, labels or parts; {same}")
    if before.get("encoder") != record["encoder"]:
        raise IntegrityError(f"the study '{out}' was made from another encoder; {same}")
    if before.get("transductive") != record["transductive"]:
        how = "with" if before.get("transductive") else "without"
        raise IntegrityError(f"the study '{out}' was started {how} --transductive; resume it {how} it")
    fewer = [f"seed {seed}" for seed in before["seeds"] if seed not in record["seeds"]]
    fewer += [f"arm '{arm}'" for arm in before["arms"] if arm not in record["arms"]]
    if fewer:
        raise IntegrityError(
            f"the study '{out}' has {', '.join(fewer)}, which would be left out now; resume it with --seeds and "
            "--twin as before (more is allowed)"
        )


def _is_finished(out: Path, one: Planned) -> bool:
    """Return whether the member has ended, with as many steps as are wanted now."""
    folder, recipe = out / one.folder, as_twin(one.recipe) if one.twin_of else one.recipe
    if not (folder / SUMMARY).is_file():
        return False
    stored = load_recipe(folder / RECIPE)
    if differences := science_differences(stored, recipe):
        raise IntegrityError(
            f"the member '{folder}' was made with another recipe ({'; '.join(differences)}); start again with "
            "--overwrite"
        )
    return stored.train.steps == recipe.train.steps


def _member(out: Path, one: Planned, *, scored: bool) -> Member:
    folder = out / one.folder
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{SUMMARY} of '{folder}' is damaged ({error}); delete the folder and resume") from error
    scores = load_scores(folder / SCORES) if scored else None
    return Member(one.arm, one.seed, one.folder, summary, scores)
