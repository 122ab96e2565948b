"""What every export says of itself: README.md for people, contract.json for programs, both of the same facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from geomed_mae.errors import ConfigError
from geomed_mae.exporters.request import Request
from geomed_mae.image import Channel
from geomed_mae.modalities import Modality, load_modality
from geomed_mae.models.contract import ChannelContract, Contract

README, CONTRACT = "README.md", "contract.json"
PHYSICAL, NORMALISED = "physical", "normalised"
"""What an exported model is fed: values in the channels' units, or `(value - mean) / std` made by the caller."""

SPREAD = "spread = (p95 - p5) / 3.29"
"""Robust standard deviation of an image's valid pixels (`archives.statistics`)."""


def contract_json(request: Request, *, values: str = PHYSICAL, **layout: Any) -> dict[str, Any]:
    """Return the model's contract for the exported channels alone, in their order, as contract.json holds it.

    Args:
        request: what is exported.
        values: PHYSICAL or NORMALISED.
        layout: more entries of section `input`, such as layout="b c y x".

    Returns:
        the contract with sections `input` (size, patch, spacing and its unit, values, `layout` and, of PHYSICAL ones,
        `scaled_already`: channels that go in as `(value - median) / spread` all the same) and, of a task model,
        `output` (task, classes, multi_label). `spacing` is None where positions count patches.
    """
    whole = request.encoder.contract
    own = Contract(
        channels=request.entries,
        crop_2d=whole.crop_2d,
        crop_3d=whole.crop_3d,
        pooling=whole.pooling,
        fingerprint=whole.fingerprint,
        images=whole.images,
        steps=whole.steps,
    )
    taken = {
        "size": list(request.size),
        "patch": list(request.patch),
        "spacing": None if request.distance is None else list(request.distance),
        "spacing_unit": _unit(request),
        "values": values,
        **layout,
    }
    if values == PHYSICAL:
        taken["scaled_already"] = [entry.channel.name for entry in request.entries if entry.method == "image"]
    data = {**json.loads(own.to_json()), "input": taken}
    if request.task is not None:
        head = request.task.spec.head
        data["output"] = {"task": head.task, "classes": list(head.classes), "multi_label": head.multi_label}
    return data


def model_card(
    request: Request,
    *,
    title: str,
    opening: str,
    library: str | None = None,
    tags: Sequence[str] = (),
    values: str = PHYSICAL,
    notes: Sequence[str] = (),
) -> str:
    """Return README.md.

    Args:
        request: what is exported.
        title: of the page.
        opening: what the folder is, and the lines of code that open it; Markdown.
        library: `library_name` of the front matter, for the Hugging Face hub.
        tags: of the front matter, beside our own.
        values: PHYSICAL or NORMALISED: what the model is fed.
        notes: more paragraphs on the input, Markdown.
    """
    front = [f"library_name: {library}"] if library else []
    trained = ("masked-autoencoder", "self-supervised") if _is_autoencoder(request) else ()
    front.append(f"tags: [{', '.join([*tags, *trained, 'geomed-mae'])}]")
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {title}",
        opening.strip(),
        "## Input",
        _fed(request, values),
        channel_table(request.entries),
        *_input_notes(request),
        *_stored_note(request),
        *notes,
        *([] if request.task is None else ["## Classes", _classes(request)]),
        "## Where it comes from",
        _provenance(request),
        "## Limits",
        _limits(request),
        "## Licence",
        "Not stated. Whoever hands this model on decides on it; terms of the training images may bind it too.",
        f"{CONTRACT} holds the input in machine-readable form, with each channel's physics.",
    ]
    return "\n\n".join(parts) + "\n"


def from_stored(modality: Modality) -> dict[float, str]:
    """Return how a number that files of a modality store becomes a value, in words, by what is added to it first.

    0 is the usual rule; the other, where there is one, is that of products since a processing baseline.
    """
    shift = f" {'-' if modality.offset < 0 else '+'} {abs(modality.offset):g}" if modality.offset else ""
    rules = {0.0: f"number * {modality.scale:g}{shift}"}
    if modality.scene is not None and (rule := modality.scene.offset) is not None:
        added = f"(number {'-' if rule.add < 0 else '+'} {abs(rule.add):g})"
        rules[rule.add] = f"{added} * {modality.scale:g}{shift}"
    return rules


def _stored_note(request: Request) -> list[str]:
    """Say how stored numbers become values: other tools hand them over as they are."""
    try:
        modality = load_modality(request.modality)
    except ConfigError:  # a modality file of the user's, which is not here
        return []
    fixed = sorted({entry.channel.unit for entry in request.entries if entry.method == "fixed"})
    if (modality.scale, modality.offset) == (1.0, 0.0) or not fixed:
        return []
    usual, *since = from_stored(modality).values()
    note = f"Files of this modality store numbers; {' and '.join(fixed)} = {usual}"
    if since:
        baseline = f"{modality.scene.offset.since:05.2f}"
        note += f", in products since processing baseline {baseline}, unless they were harmonised, {since[0]}"
    return [f"{note}, if the files say nothing else. Make values of them first."]


def channel_table(entries: Sequence[ChannelContract]) -> str:
    """Return the channels as a Markdown table, in the order of the input."""
    rows = [
        f"| {number} | {entry.channel.name} | {physics(entry.channel)} | {entry.channel.unit} | {_scaled(entry)} | "
        + ("none" if entry.value_range is None else "{:g} to {:g}".format(*entry.value_range))
        + " |"
        for number, entry in enumerate(entries)
    ]
    head = "| channel | name | physics | unit | mean | std | clipped to |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def physics(channel: Channel) -> str:
    """Return what a channel measures in a few words, such as "optical, 665 nm, 31 nm wide"."""
    said = (
        (channel.wavelength_nm, "{:g} nm"),
        (channel.bandwidth_nm, "{:g} nm wide"),
        (channel.polarisation, "{}"),
        (channel.radar_ghz, "{:g} GHz"),
        (channel.sequence, "{}"),
        (channel.echo_time_ms, "TE {:g} ms"),
        (channel.repetition_time_ms, "TR {:g} ms"),
        (channel.inversion_time_ms, "TI {:g} ms"),
        (channel.tube_kv, "{:g} kV"),
    )
    return ", ".join([channel.kind, *(form.format(value) for value, form in said if value is not None)])


def _scaled(entry: ChannelContract) -> str:
    return f"{entry.center:g} | {entry.scale:g}" if entry.method == "fixed" else "its median | its spread"


def _is_autoencoder(request: Request) -> bool:
    """Return whether a pretraining by this package is recorded: a foreign encoder has a history of its own."""
    return request.pretrained and request.encoder.contract.images > 0


def _unit(request: Request) -> str:
    return "m" if request.on_ground else "mm"


def _fed(request: Request, values: str) -> str:
    axes = "row, column" if len(request.size) == 2 else "slice, row, column"
    size = " x ".join(map(str, request.size))
    many = len(request.entries)
    said = f"{many} channel{'s' if many > 1 else ''} in this order, {size} ({axes}). "
    if values == NORMALISED:
        return said + (
            "The model takes `(value - mean) / std`, with values in the unit below, clipped first where a range is "
            "given, and 0 where a pixel is not valid."
        )
    as_they_are = (
        "The model takes values in the unit below as they are: clipping and `(value - mean) / std` are part of it"
    )
    own = "here mean and std are the image's own, the model takes values that are scaled already."
    if not request.per_image:
        return said + as_they_are + "."
    if all(entry.method == "image" for entry in request.entries):
        return f"{said}W{own}"
    return f"{said}{as_they_are}; but w{own}"


def _input_notes(request: Request) -> list[str]:
    notes = []
    if request.distance is not None:
        steps = " x ".join(f"{step:g}" for step in request.distance)
        notes.append(
            f"Positions are physical: the model is for pixels {steps} {_unit(request)} apart. For images of another "
            "spacing export again with that spacing."
        )
    if request.per_image:
        notes.append(
            "Where mean and std are the image's own, the input is `(value - median) / spread`: take the whole image's "
            f"median and {SPREAD} over its valid pixels, per channel, not those of a window."
        )
    return notes


def _classes(request: Request) -> str:
    head = request.task.spec.head
    pixel = "pixel" if len(request.size) == 2 else "voxel"
    what = f"a class a {pixel}" if head.task == "segment" else "classes of an image"
    sums = "each a probability of its own" if head.multi_label else "they sum to 1"
    rows = "\n".join(f"| {number} | {name} |" for number, name in enumerate(head.classes))
    return f"The output is {what}: probabilities in this order, {sums}.\n\n| number | class |\n|---|---|\n{rows}"


def _provenance(request: Request) -> str:
    contract, spec = request.encoder.contract, request.encoder.spec
    shape = f"width {spec.dim}, {spec.depth} blocks, {spec.heads} heads, patches of {'x'.join(map(str, request.patch))}"
    if not request.pretrained:
        # The contract of a model from scratch is that of the encoder that it is compared with: not its own history.
        return f"A vision transformer ({shape}), trained on labelled images alone, without pretraining."
    trained, known = "whose pretraining is not recorded", contract.fingerprint or "not recorded"
    if _is_autoencoder(request):
        trained = f"pretrained as a masked autoencoder on {contract.images} images for {contract.steps} steps"
    own = ", then fine-tuned on labelled images" if request.tuned else ""
    return f"A vision transformer ({shape}), {trained}{own}. Fingerprint of the pretraining images: `{known}`."


def _limits(request: Request) -> str:
    record = "pretrained_on.json" if request.task is None else "trained_on.json"
    kept = (
        f" {record} has keyed hashes of the images that it has seen, so that scores over them can be refused."
        if request.encoder.seen is not None
        else " What it has seen is not recorded."
    )
    return (
        "Every pixel is taken as valid; in geomed-mae itself what is not valid has no influence. Other channels, units "
        f"or sensors than those above give numbers without meaning. No score is stated here.{kept}"
    )
