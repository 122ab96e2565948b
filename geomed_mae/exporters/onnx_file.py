"""ONNX files: written from a graph of torch.export, with the contract in their metadata, and opened in onnxruntime.

torch's exporter writes down in whose folders each operation was traced; that is taken out. An ONNX file is one file,
weights included.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from geomed_mae.errors import ConfigError, MissingExtraError
from geomed_mae.exporters.graph import AXES, INPUT, Graph
from geomed_mae.exporters.proof import prove

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHATTY = ("onnxscript", "onnx_ir")
"""Loggers of what torch's exporter is built on."""

MOST_BYTES = 2**31 - 2**24
"""Of the weights in one file: Protocol Buffers hold less than 2 GiB, and the graph takes some of it."""


def require_packages(target: str) -> None:
    """Make sure that ONNX files can be written and opened.

    Raises:
        MissingExtraError: a package of the extra `export` is not installed.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"export --to {target}", package, "export")


def onnx_model(graph: Graph, *, opset: int, ir_version: int | None = None) -> onnx.ModelProto:
    """Return a graph as an ONNX model with named inputs, outputs and axes, and without anything of this machine.

    Args:
        graph: of a request.
        opset: version of the operators.
        ir_version: of the file format, for old readers; None takes the exporter's.

    Raises:
        ConfigError: an operation has no ONNX counterpart, or the model is larger than one file can be.
    """
    import onnx

    size = sum(weight.numel() * weight.element_size() for weight in graph.program.state_dict.values())
    if size > MOST_BYTES:
        raise ConfigError(f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2; take --to torch")
    try:
        with _quiet():
            program = torch.onnx.export(
                graph.program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(graph.outputs),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        head = graph.request.task
        name = "the encoder" if head is None else f"head '{head.spec.head.name}'"
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name} cannot be written as ONNX: {line}") from error
    model = program.model_proto
    _anonymous(model)
    _name_axes(graph, model)
    model.producer_name, model.producer_version = "geomed-mae", ""
    model.graph.name = "geomed_mae"
    if ir_version is not None:
        model.ir_version = ir_version
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on each constant that it folds out of the log."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _anonymous(model: onnx.ModelProto) -> None:
    """Take out what the exporter noted of the traced code: its files, lines and names of classes."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    model.ClearField("doc_string")
    model.graph.ClearField("doc_string")
    for part in (model.graph, *model.functions):
        for node in part.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
    for function in model.functions:
        del function.metadata_props[:], function.value_info[:]
        function.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.ClearField("doc_string")


def _name_axes(graph: Graph, model: onnx.ModelProto) -> None:
    """Name open axes: "batch" and, as multiples of the patch, "16*patch_rows"; torch calls them s77."""
    axes = AXES[len(graph.request.size)]
    wanted = ("batch", "", *(f"patch_{axis}" for axis in axes))
    names = {}
    for said, name in zip(model.graph.input[0].type.tensor_type.shape.dim, wanted, strict=True):
        if symbol := re.search(r"\bs\d+\b", said.dim_param):
            names[symbol.group()] = name
    for value in (*model.graph.input, *model.graph.output):
        for said in value.type.tensor_type.shape.dim:
            if said.dim_param:
                said.dim_param = re.sub(
                    r"\bs\d+\b", lambda found: names.get(found.group(), found.group()), said.dim_param
                )


def describe(model: onnx.ModelProto, properties: Mapping[str, Any]) -> None:
    """Replace a model's metadata_props; every value is written as JSON."""
    del model.metadata_props[:]
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)


def contract_properties(graph: Graph, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contract as metadata_props: the whole, and what most programs want one by one.

    Lists have one entry a channel, in the order of the input. `scaling` says for each channel whether the graph scales
    it ("fixed": clip to `value_range`, then `(value - mean) / std`) or it goes in scaled by its whole image's median
    and spread ("image"; its mean and std are null).
    """
    request = graph.request
    entries = request.entries
    properties = {
        "producer": "geomed-mae",
        "modality": request.modality,
        "channels": [entry.channel.name for entry in entries],
        "kinds": [entry.channel.kind for entry in entries],
        "units": [entry.channel.unit for entry in entries],
        "wavelength_nm": [entry.channel.wavelength_nm for entry in entries],
        "bandwidth_nm": [entry.channel.bandwidth_nm for entry in entries],
        "scaling": [entry.method for entry in entries],
        "mean": [None if entry.method == "image" else entry.center for entry in entries],
        "std": [None if entry.method == "image" else entry.scale for entry in entries],
        "value_range": [None if entry.value_range is None else list(entry.value_range) for entry in entries],
        "size": list(request.size),
        "any_size": graph.dynamic,
        "patch": list(request.patch),
        "spacing": None if request.distance is None else list(request.distance),
        "spacing_unit": "m" if request.on_ground else "mm",
        "contract": contract,
    }
    if request.task is not None:
        head = request.task.spec.head
        properties |= {"task": head.task, "classes": list(head.classes), "multi_label": head.multi_label}
    return properties


def opened(file: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def held_against(
    graph: Graph,
    session: onnxruntime.InferenceSession,
    fed: np.ndarray,
    wanted: Sequence[Tensor],
    *,
    target: str,
    source: str,
    tolerance: float,
) -> list[dict[str, Any]]:
    """Run a session and hold each of its outputs against the original's.

    Args:
        graph: that the file was made of.
        session: the file, opened.
        fed: float32 (b, c, *size), what goes in.
        wanted: the original's answers, one an output; the first b samples count.
        target: name of the export, for the message.
        source: what was fed, in words.
        tolerance: largest difference relative to the largest value.

    Returns:
        one `proof.prove` an output.

    Raises:
        IntegrityError: an output differs.
    """
    import onnxruntime

    theirs = session.run(None, {INPUT: np.ascontiguousarray(fed, dtype=np.float32)})
    return [
        prove(
            target,
            mine[: len(fed)],
            other,
            runtime=f"onnxruntime {onnxruntime.__version__}",
            compared=f"{name} on {source} and noise",
            tolerance=tolerance,
        )
        for name, mine, other in zip(graph.outputs, wanted, theirs, strict=True)
    ]
