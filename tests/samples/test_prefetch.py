"""Batches ahead of the computation."""

from __future__ import annotations

import pytest
import torch

from geomed_mae.samples.prefetch import ahead


def numbers(closed: list[bool], stop: int = 5):
    try:
        yield from (torch.full((2,), float(number)) for number in range(stop))
    finally:
        closed.append(True)


def test_on_the_cpu_batches_pass_as_they_are_and_their_source_is_closed():
    closed: list[bool] = []
    source = ahead(numbers(closed), torch.device("cpu"))
    assert next(source)[0] == 0 and next(source)[0] == 1 and not closed
    source.close()
    assert closed == [True]


class Box:
    """A batch of one tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.value,)

    def pin_memory(self) -> Box:
        return Box(self.value.pin_memory())

    def to(self, device: torch.device) -> Box:
        return Box(self.value.to(device, non_blocking=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_come_in_order_with_their_values_and_errors_come_through():
    device = torch.device("cuda", 0)

    def source():
        for number in range(20):
            yield Box(torch.full((1 << 20,), float(number)))
        raise ValueError("the end")

    made = ahead(source(), device)
    sums = [float(next(made).value.double().mean()) for _ in range(20)]
    assert sums == list(range(20))
    with pytest.raises(ValueError, match="the end"):
        next(made)
