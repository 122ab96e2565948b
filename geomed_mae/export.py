"""The verb export: an encoder -> the folder that another tool opens. One file per target in geomed_mae/exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.plugins import load_plugin
from geomed_mae.training.study_files import refuse_study

MARKER = "export"


def export(
    source: str | Path,
    target: str,
    out: str | Path,
    *,
    modality: str | None = None,
    channels: str | None = None,
    size: str | None = None,
    spacing: str | None = None,
) -> dict[str, Any]:
    """Export the encoder of a run or an encoder folder.

    Args:
        source: run or encoder folder.
        target: name of a module in geomed_mae/exporters, for example "timm".
        out: folder to write; must not hold anything yet.
        modality: the modality whose channels are exported; may be left out when the encoder knows only one.
        channels: comma-separated channel names in the order of the exported model's input; None takes all.
        size: comma-separated input size in pixels or voxels; None takes the pretraining crop.
        spacing: comma-separated distance between pixels per axis, metres for rasters and mm for others, for encoders
            with physical positions; None takes their reference.

    Returns:
        what was written and the largest difference between the exported model and the encoder.

    Raises:
        ConfigError: unknown target, modality or channel, a size that does not fit the patch, or `out` is not empty.
        IntegrityError: the exported model does not compute the same; nothing is left behind.
    """
    out = Path(out)
    plugin = load_plugin("exporters", target, marker=MARKER)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"'{out}' is not empty; choose another --out")
    refuse_study(source, "export")
    encoder = load_encoder(source)
    known = sorted({entry.modality for entry in encoder.contract.channels})
    if modality is None:
        if len(known) > 1:
            raise ConfigError(f"the encoder knows {', '.join(known)}; choose one with --modality")
        modality = known[0]
    try:
        sizes = None if size is None else tuple(int(part) for part in size.split(","))
    except ValueError:
        raise ConfigError(f"--size is whole numbers with commas between, for example 224,224, not '{size}'") from None
    try:
        steps = None if spacing is None else tuple(float(part) for part in spacing.split(","))
    except ValueError:
        raise ConfigError(f"--spacing is numbers with commas between, for example 20,20, not '{spacing}'") from None
    names = None if channels is None else tuple(name.strip() for name in channels.split(","))
    return plugin.export(encoder, out, modality=modality, channels=names, size=sizes, spacing=steps)
