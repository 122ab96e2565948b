"""Prefetch: the next batch is on its way to the device while this one is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A batch that can be pinned and moved."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that computation uses."""

    def pin_memory(self: _Batch) -> _Batch:
        """Return the batch in page-locked memory."""

    def to(self: _Batch, device: torch.device) -> _Batch:
        """Return the batch on `device`."""


_Batch = TypeVar("_Batch", bound=Movable)


def ahead(batches: Iterator[_Batch], device: torch.device) -> Iterator[_Batch]:
    """Yield the batches on `device`; for CUDA one is always made, pinned, copied and converted in advance.

    A thread of its own does that, on a stream of its own: `batches` is run there, so that with data.workers=0 images
    are decoded beside the computation. Elsewhere batches pass as they are. What `batches` raises is raised here.
    """
    if device.type == "cuda":
        yield from _ahead_on_cuda(batches, device)
    else:
        yield from batches


def _ahead_on_cuda(batches: Iterator[_Batch], device: torch.device) -> Iterator[_Batch]:
    stream = torch.cuda.Stream(device)

    def fetch() -> tuple[_Batch, torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch.pin_memory().to(device), stream.record_event()

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            coming = pool.submit(fetch)
            while (found := coming.result()) is not None:
                coming = pool.submit(fetch)
                batch, copied = found
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                for tensor in batch.tensors:
                    tensor.record_stream(current)  # its memory is the other stream's, which must not reuse it yet
                yield batch
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
