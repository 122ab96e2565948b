"""A request as a graph of tensor operations (torch.export): what the targets `torch`, `onnx` and `onnx-qgis` write.

Batch and size stay open where they can. What torch notes of the code that it traced, paths of this machine among it,
is taken out, and the input that it was traced with is noise: a graph holds nothing of anybody's images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from geomed_mae.errors import ConfigError
from geomed_mae.exporters.fixed import MOST_PATCHES, fixed
from geomed_mae.exporters.proof import TOLERANCE, Answer, Trial, ours, trial
from geomed_mae.exporters.request import Request

INPUT = "pixels"
LEAST_PATCHES = 2
"""Along an axis of an input of any size: torch takes an axis of one patch for another graph."""

AXES = {2: ("rows", "columns"), 3: ("slices", "rows", "columns")}
GRAPH_TOLERANCE = 5 * TOLERANCE
"""Of runtimes with kernels of their own: they add up in another order, in every block."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A traced network.

    Attributes:
        program: the graph with its weights; one input (b, c, *size), outputs as `outputs` names them.
        request: what it was made of.
        dynamic: whether any size goes in that is a multiple of the patch; the batch is open always.
        why_fixed: why it is for one size; "" where it is not.
    """

    program: ExportedProgram
    request: Request
    dynamic: bool
    why_fixed: str = ""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return ("features", "vector") if self.request.task is None else ("probabilities",)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Sizes to compare on: the request's and, where any goes, one patch more or less along each axis."""
        own = self.request.size
        if not self.dynamic:
            return (own,)
        least = tuple(max(size, LEAST_PATCHES * step) for size, step in zip(own, self.request.patch, strict=True))
        most = (MOST_PATCHES * step for step in self.request.patch)
        return (
            least,
            tuple(
                size + step if size < end else size - step
                for size, step, end in zip(least, self.request.patch, most, strict=True)
            ),
        )

    def takes(self) -> dict[str, Any]:
        """Return entries of section `input` of contract.json: layout, and which sizes go in."""
        axes = " ".join(axis[0] for axis in ("batch", "channel", *(("z", "y", "x")[-len(self.request.size) :])))
        return {"name": INPUT, "layout": axes, "dtype": "float32", "any_size": self.dynamic}


def traced(
    request: Request, *, dynamic: bool = True, around: Callable[[nn.Module], nn.Module] = lambda network: network
) -> Graph:
    """Trace the network of a request: of any batch and, where `dynamic` and it can be, of any size.

    Args:
        request: what is exported.
        dynamic: whether any size is wanted.
        around: puts the network into another module, with the same outputs.

    Raises:
        ConfigError: the head is made of what torch.export has no graph for.
    """
    if dynamic and request.learned:
        return _of_one_size(request, around, "positions are a learned table of one grid")
    if dynamic and max(request.grid) > MOST_PATCHES:
        return _of_one_size(request, around, f"an axis of it has more than {MOST_PATCHES} patches")
    if not dynamic:
        return _of_one_size(request, around, "")
    network = around(fixed(request, dynamic=True))
    try:
        return Graph(_program(request, network, dynamic=True), request, dynamic=True)
    except (RuntimeError, ValueError) as error:  # what torch.export raises is one of these
        log.warning("no graph for inputs of any size (%s): the export is for one size", _line(error))
        return _of_one_size(request, around, f"its head is for one size ({_line(error)})")


def _of_one_size(request: Request, around: Callable[[nn.Module], nn.Module], why: str) -> Graph:
    network = around(fixed(request))
    try:
        return Graph(_program(request, network, dynamic=False), request, dynamic=False, why_fixed=why)
    except (RuntimeError, ValueError) as error:
        name = "the encoder" if request.task is None else f"head '{request.task.spec.head.name}'"
        raise ConfigError(f"{name} cannot be written as a graph of tensor operations: {_line(error)}") from error


def _program(request: Request, network: nn.Module, *, dynamic: bool) -> ExportedProgram:
    size = tuple(LEAST_PATCHES * step for step in request.patch) if dynamic else request.size
    example = torch.randn(2, len(request.entries), *size, generator=torch.Generator().manual_seed(0))
    shapes = {0: Dim("batch", min=1)}
    if dynamic:
        for axis, (name, step) in enumerate(zip(AXES[len(size)], request.patch, strict=True)):
            shapes[2 + axis] = step * Dim(f"patch_{name}", min=LEAST_PATCHES, max=MOST_PATCHES)
    with torch.no_grad():
        return _anonymous(torch.export.export(network, (example,), dynamic_shapes=(shapes,)))


def _anonymous(program: ExportedProgram) -> ExportedProgram:
    """Take out where in whose folders the traced code stands, and the example that it was traced with."""
    modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for module in modules:
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def comparisons(graph: Graph, *, noise: int = 2) -> list[tuple[Trial, Answer]]:
    """Return what to compare on, with the original's answers: for each of `Graph.sizes` a real image and noise."""
    found = []
    for size in graph.sizes:
        request = replace(graph.request, size=size)
        given = trial(request, noise=noise)
        found.append((given, ours(request, given)))
    return found


def answers(graph: Graph, answer: Answer) -> tuple[torch.Tensor, ...]:
    """Return the part of an answer that a graph's outputs are, in their order."""
    return tuple(getattr(answer, name) for name in graph.outputs)


def size_note(graph: Graph) -> str:
    """Return a sentence on the sizes that go in, for the model card."""
    patch = " x ".join(map(str, graph.request.patch))
    if graph.dynamic:
        return (
            f"Any batch and any size that is a multiple of {patch}, from {LEAST_PATCHES} to {MOST_PATCHES} patches an "
            f"axis, goes in. Sizes near the one above are what the model was trained with."
        )
    why = f", because {graph.why_fixed}" if graph.why_fixed else ""
    return f"Any batch goes in, of this one size{why}. Export again with --size for another."


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())[:200] or type(error).__name__
