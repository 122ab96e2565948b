"""Export to torch.export: one .pt2 file with graph and weights that torch opens without this package.

    model = torch.export.load("model.pt2").module()

Batch and size are open where they can be. The file also holds the contract, as extra file `contract.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from geomed_mae.exporters.card import CONTRACT, README, contract_json, model_card
from geomed_mae.exporters.folder import building, carry_native, outcome
from geomed_mae.exporters.graph import Graph, answers, comparisons, size_note, traced
from geomed_mae.exporters.proof import TOLERANCE, prove, prove_contract
from geomed_mae.exporters.request import Request

TAKES = ("encoder", "model")
FILE = "model.pt2"
RUNTIME = f"torch {torch.__version__.split('+', maxsplit=1)[0]}"

OPENING = """The file `{file}` is a graph of torch.export: network and weights, which torch opens without any other
package.

```python
import torch

model = torch.export.load("{file}").module()
{outputs} = model(pixels)  # pixels: float32 ({axes}); {what}
```

The contract is in the file too: `extra = {{"contract.json": ""}}; torch.export.load("{file}", extra_files=extra)`.
torch.compile and torch's AOTInductor take the loaded program. A .pt2 file of a newer torch may not open in an older
one; this one was written by {version}."""


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` with model.pt2, open it again with torch.export.load, and compare.

    Returns:
        folder, files, channels, input_size, any_size (whether other sizes go in), outputs and `parity`.

    Raises:
        ConfigError: `out` holds something, or the head has no graph.
        IntegrityError: the file does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    graph = traced(request)
    contract = contract_json(request, **graph.takes())
    with building(out) as folder:
        torch.export.save(graph.program, folder / FILE, extra_files={CONTRACT: json.dumps(contract)})
        parity = _parity(graph, folder / FILE)
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
        prove_contract("torch", folder, request)
        (folder / README).write_text(_card(graph), encoding="utf-8")
        carry_native(request, folder)
    return outcome(
        request,
        out,
        any_size=graph.dynamic,
        outputs=list(graph.outputs),
        parity=parity,
    )


def _parity(graph: Graph, file: Path) -> dict[str, Any]:
    """Open the file and return the largest difference over all sizes, batches and outputs."""
    model = torch.export.load(file).module()
    found = []
    for given, answer in comparisons(graph):
        for batch in (given.fed, given.fed[:1]):
            with torch.no_grad():
                theirs = model(batch)
            theirs = theirs if isinstance(theirs, tuple) else (theirs,)
            for name, mine, other in zip(graph.outputs, answers(graph, answer), theirs, strict=True):
                found.append(
                    prove(
                        "torch",
                        mine[: len(batch)],
                        other,
                        runtime=RUNTIME,
                        compared=f"{name} on {given.source} and noise",
                        tolerance=TOLERANCE,
                    )
                )
    return max(found, key=lambda one: one["largest_relative_difference"])


def _card(graph: Graph) -> str:
    request = graph.request
    axes = ", ".join(["batch", "channel", *("slice", "row", "column")[-len(request.size) :]])
    what = "a map of tokens (b, d, *grid) and its mean (b, d)" if request.task is None else "class probabilities"
    return model_card(
        request,
        title="A geomed-mae model as a torch.export program",
        opening=OPENING.format(file=FILE, outputs=", ".join(graph.outputs), axes=axes, what=what, version=RUNTIME),
        tags=("torch-export",),
        notes=(size_note(graph),),
    )
