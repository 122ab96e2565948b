"""Classes of many whole images, by one or several processes, kept in the journal until all are there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import GeomedError, ReadError
from geomed_mae.heads.task_model import TaskModel
from geomed_mae.heads.windows import image_chances
from geomed_mae.outputs.failures import Failure, failure_of
from geomed_mae.outputs.rounds import about_row, fingerprint_of
from geomed_mae.outputs.work import DONE, Work
from geomed_mae.training.distributed import Ranks

IMAGES_A_ROUND = 16
"""Images of each process between two lines in the journal."""


@dataclass(slots=True, kw_only=True)
class Classifying:
    """Class probabilities of many images.

    Attributes:
        model: in evaluation mode, on its device.
        digest: of the model.
        index: archive of the images.
        work: where finished images are noted.
        ranks: processes that share the images.
        batch: windows computed at a time.
        failed: images that could not be read; filled by `run`.
        chances: key -> probability of each class; filled by `run`.
    """

    model: TaskModel
    digest: str
    index: Index
    work: Work
    ranks: Ranks
    batch: int
    failed: dict[str, Failure] = field(default_factory=dict)
    chances: dict[str, list[float]] = field(default_factory=dict)

    def fingerprint(self, row: Row) -> str:
        """Return the fingerprint of all that an image's classes follow from."""
        return fingerprint_of(self.model, self.digest, [about_row(row), self.batch])

    def run(self, rows: Sequence[Row]) -> Generator[None, None, None]:
        """Classify images; yield after each one of this process.

        Raises:
            ConfigError: an image is not what the model is made for.
            OutputError: the disk is full.
        """
        step = IMAGES_A_ROUND * self.ranks.world
        for first in range(0, len(rows), step):
            mine, lines, failed = rows[first : first + step][self.ranks.rank :: self.ranks.world], [], {}
            failure = None
            try:
                for row in mine:
                    try:
                        found = image_chances(self.model, self.index, row, batch=self.batch)
                        lines.append({"key": row.key, DONE: self.fingerprint(row), "chances": found.tolist()})
                    except ReadError as error:
                        failed[row.key] = failure_of(error)
                    yield
            except GeomedError as error:
                failure = error
            done = []
            for theirs in self.ranks.gather_or_raise({"lines": lines, "failed": failed}, failure):
                done += theirs["lines"]
                self.failed |= {key: (reason, detail) for key, (reason, detail) in theirs["failed"].items()}
            self.chances |= {line["key"]: line["chances"] for line in done}
            self.ranks.first_does(lambda done=done: self.work.note(done))

    def of(self, rows: Sequence[Row]) -> np.ndarray:
        """Return float32 (rows, classes) of images that were classified."""
        return np.array([self.chances[row.key] for row in rows], np.float32).reshape(len(rows), len(self.model.classes))
