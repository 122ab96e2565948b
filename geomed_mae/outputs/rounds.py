"""Whole images from blocks: computed by one or several processes, kept on disk, put together when all are there.

Images are taken in rounds. In a round each process computes every n-th block, then all wait for one another, then each
puts together every n-th image. What is written does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import GeomedError, ReadError
from geomed_mae.heads.blocks import answer, batches_of, cache_of
from geomed_mae.heads.task_model import TaskModel
from geomed_mae.heads.tiling import Block, block_size, blocks_of
from geomed_mae.image import Geometry, RasterGeometry, VolumeGeometry
from geomed_mae.outputs import NAME_HEX
from geomed_mae.outputs.block_file import put_together, strip_rows, write_block
from geomed_mae.outputs.failures import Failure, failure_of
from geomed_mae.outputs.formats import DICOM_SEG, chances_name, writer_options
from geomed_mae.outputs.work import DONE, Work, block_mark, sha256, writing
from geomed_mae.training.distributed import Ranks
from geomed_mae.writers import NODATA, writer

BLOCKS_A_PROCESS = 4
"""Blocks that each process of several computes at least between two waits."""
FILES = "files"
"""Folder in an image's work folder for finished files, until they are moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One image to segment.

    Attributes:
        row: the image.
        form: name of the writer.
        blocks: that it is cut into.
        batches: batches of windows of each block.
        fingerprint: of all that its blocks follow from.
        done: of all that its files follow from.
    """

    row: Row
    form: str
    blocks: tuple[Block, ...]
    batches: tuple[int, ...]
    fingerprint: str
    done: str


@dataclass(slots=True, kw_only=True)
class Segmenting:
    """Class maps of many images.

    Attributes:
        model: in evaluation mode, on its device.
        digest: of `TaskModel.digest`.
        index: archive of the images.
        work: where half-finished work lies.
        ranks: processes that share it.
        batch: windows computed at a time.
        chances: also write probabilities.
        failed: images that could not be read; filled by `run`.
        lines: key -> line of the table; filled by `run`.
    """

    model: TaskModel
    digest: str
    index: Index
    work: Work
    ranks: Ranks
    batch: int
    chances: bool
    failed: dict[str, Failure] = field(default_factory=dict)
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def job(self, row: Row, form: str) -> Job:
        """Plan one image."""
        crop, classes = self.model.spec.crop, len(self.model.classes)
        size = block_size(row.shape, crop, classes=classes, channels=len(row.channels))
        parts = [about_row(row), size, self.batch, self.chances]
        fingerprint = fingerprint_of(self.model, self.digest, parts)
        return Job(
            row=row,
            form=form,
            blocks=tuple(blocks_of(row.shape, size)),
            batches=tuple(batches_of(row, size, crop, self.batch)),
            fingerprint=fingerprint,
            done=fingerprint_of(self.model, self.digest, [fingerprint, form, self._place(row, form)]),
        )

    def _place(self, row: Row, form: str) -> list[Any]:
        """Return what a file says beside the answer: where the image lies and, in DICOM, whose it is."""
        whose = self.index.identity(row.key) if form == DICOM_SEG else ()
        return [_described(self.index.outline(row.key).geometry), sorted(whose)]

    def run(self, jobs: Sequence[Job]) -> Generator[None, None, None]:
        """Do all jobs; yield after each batch of windows of this process.

        Raises:
            OutputError: the disk is full, in this process or another.
        """
        for some in self._rounds(jobs):
            failed, failure = {}, None
            try:
                yield from self._compute(some, failed)
            except GeomedError as error:
                failure = error
            self._fail(self.ranks.gather_or_raise(failed, failure))
            whole = [job for job in some if job.row.key not in self.failed]
            failed, lines = {}, []
            try:
                for job in whole[self.ranks.rank :: self.ranks.world]:
                    self._finish(job, lines, failed)
            except GeomedError as error:
                failure = error
            finished = [line for theirs in self.ranks.gather_or_raise(lines, failure) for line in theirs]
            self._fail(self.ranks.gather_or_raise(failed, None))
            self.lines |= {line["key"]: line for line in finished}
            self.ranks.first_does(lambda finished=finished: self.work.note(finished))

    def _fail(self, all_failed: Sequence[dict[str, Failure]]) -> None:
        """Take over what the processes could not read."""
        for theirs in all_failed:
            self.failed |= {key: (reason, detail) for key, (reason, detail) in theirs.items()}

    def todo(self, job: Job) -> list[int]:
        """Return the numbers of a job's blocks that are not on disk."""
        return [number for number in range(len(job.blocks)) if not self._file(job, number).is_file()]

    def count(self, jobs: Sequence[Job]) -> int:
        """Return how many batches of windows this process will compute."""
        return sum(job.batches[number] for some in self._rounds(jobs) for job, number in self._mine(some))

    def _rounds(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Yield one image after another where there is one process, else enough of them to give work to all."""
        some: list[Job] = []
        for job in jobs:
            some.append(job)
            enough = self.ranks.alone or sum(len(one.blocks) for one in some) >= BLOCKS_A_PROCESS * self.ranks.world
            if enough:
                yield some
                some = []
        if some:
            yield some

    def _mine(self, jobs: Sequence[Job]) -> list[tuple[Job, int]]:
        # By place in the image, not by what is left to do: the others may have written some of it already.
        every = [(job, number) for job in jobs for number in range(len(job.blocks))]
        mine = every[self.ranks.rank :: self.ranks.world]
        return [(job, number) for job, number in mine if not self._file(job, number).is_file()]

    def _file(self, job: Job, number: int) -> Path:
        return self.work.place(job.row.key) / f"{number}.block"

    def _compute(self, jobs: Sequence[Job], failed: dict[str, Failure]) -> Generator[None, None, None]:
        """Compute this process's blocks of a round; images that cannot be read go to `failed`."""
        cache = None
        for job, number in self._mine(jobs):
            if job.row.key in failed:
                continue
            if cache is None or cache[0] != job.row.key:
                cache = (job.row.key, cache_of(self.index, job.row))
            rows = strip_rows(job.row.shape, len(self.model.classes), chances=self.chances)
            try:
                found = yield from answer(self.model, cache[1], job.row, job.blocks[number], batch=self.batch)
            except ReadError as error:
                failed[job.row.key] = failure_of(error)
                continue
            mark = block_mark(job.fingerprint, number)
            with writing(self.work.out):
                write_block(self._file(job, number), found, mark, rows=rows, chances=self.chances)

    def _finish(self, job: Job, lines: list[dict[str, Any]], failed: dict[str, Failure]) -> None:
        """Put an image together from its blocks and note its line of the table, or why it cannot be read."""
        row, place = job.row, self.work.place(job.row.key)
        try:
            options = writer_options(job.form, self.model, self.index, row, self.digest)
        except ReadError as error:
            failed[row.key] = failure_of(error)
            return
        geometry, made = self.index.outline(row.key).geometry, writer(job.form)
        stem, folder = row.key[:NAME_HEX], place / FILES
        counts = np.zeros(NODATA + 1, dtype=np.int64)
        with writing(self.work.out), ExitStack() as stack:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            about = (row.shape, geometry, self.model.classes)
            maps = stack.enter_context(made.stream(folder / f"{stem}{made.SUFFIX}", *about, **options))
            chances = None
            if self.chances:
                name = chances_name(stem, made)
                chances = stack.enter_context(made.stream_chances(folder / name, *about, **options))
            files = [self._file(job, number) for number in range(len(job.blocks))]
            for numbers, theirs in put_together(files, job.blocks, row.shape, len(self.model.classes)):
                maps.put(numbers)
                counts += np.bincount(numbers.ravel(), minlength=NODATA + 1)
                if chances is not None:
                    chances.put(theirs)
        pixels = {name: int(counts[number]) for number, name in enumerate(self.model.classes)}
        line = {
            "key": row.key,
            "file": f"{stem}{made.SUFFIX}",
            **({"probabilities": chances_name(stem, made)} if self.chances else {}),
            "shape": list(row.shape),
            "geometry": _described(geometry),
            "classes": list(self.model.classes),
            "pixels": {**pixels, "invalid": int(counts[NODATA])},
        }
        with writing(self.work.out):
            lines.append({**line, "sha256": self._moved(folder), DONE: job.done})
            shutil.rmtree(place)

    def _moved(self, folder: Path) -> dict[str, str]:
        """Move finished files to the output folder; return name -> SHA-256."""
        digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        for name in digests:
            (folder / name).replace(self.work.out / name)
        return digests


def about_row(row: Row) -> dict[str, Any]:
    """Return what of an image its prediction follows from: its pixels, by their keyed hash, and what describes them."""
    return {name: value for name, value in row.to_json().items() if name not in ("key", "group", "footprint")}


def fingerprint_of(model: TaskModel, digest: str, value: Any) -> str:
    """Return the SHA-256 of a JSON value together with what computes: model, kind of device, version of the code."""
    parts = [version("geomed-mae"), digest, model.device.type, value]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _described(geometry: Geometry) -> dict[str, Any]:
    if isinstance(geometry, RasterGeometry):
        return {"crs": geometry.crs, "transform": list(geometry.transform)}
    if isinstance(geometry, VolumeGeometry):
        return {"affine_lps_mm": geometry.affine.tolist()}
    return {"spacing_mm": geometry.spacing}
