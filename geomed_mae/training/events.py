"""TensorBoard event files, written without torch.utils.tensorboard: its file names carry the host's name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class EventFile:
    """Scalars for TensorBoard in `folder`; does nothing where the package tensorboard is missing.

    A resumed run opens a file of its own, which tells TensorBoard to forget what earlier files say from that step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer: Any = None
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2, summary_pb2
        # The name has the form that TensorBoard looks for, events.out.tfevents.<when>.<who>, and sorts by time.
        self._file = (folder / f"events.out.tfevents.{time.time_ns():020d}.step{first_step}").open("wb")
        self._writer = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one number a name."""
        if self._writer is None:
            return
        entries = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summary.Summary(value=entries)
        self._write(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
