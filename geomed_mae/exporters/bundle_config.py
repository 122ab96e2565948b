"""The configuration of a MONAI bundle: what turns files into the network's input, and its answer into files.

Everything is a plain MONAI transform or a short expression, so that a bundle needs MONAI alone. It does what `predict`
does: the file's own axes (nothing is reoriented), slices of a DICOM series in order along their normal, clipping and
scaling by the contract, windows of the training crop half a window apart with a Gaussian weight; and to classify,
windows side by side whose probabilities are averaged. One thing differs: where positions are physical, `predict` tells
them the file's own spacing, and the bundle, whose network takes nothing but pixels, resamples to the reference spacing.

Arrays are MONAI's: (channel, x, y[, z]), the axes of NIfTI. Ours are reversed, (channel, [z,] y, x).
"""

from __future__ import annotations

import re
from typing import Any

from geomed_mae.archives.statistics import MAX_SAMPLES, NORMAL_SPAN
from geomed_mae.errors import ConfigError
from geomed_mae.exporters.request import Request
from geomed_mae.heads.tiling import AT_MARGIN, LEAST_WEIGHT, SIGMA

IMAGE, PRED = "image", "pred"
WINDOWS = 4
"""Windows computed at a time, `sw_batch_size`."""


def inference_config(request: Request) -> dict[str, Any]:
    """Return configs/inference.json of a fine-tuned model.

    Raises:
        ConfigError: some channels are scaled by their image's statistics and others by fixed numbers.
    """
    segments = request.task.spec.head.task == "segment"
    return {
        "imports": ["$import glob", "$import os", "$import numpy", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "channels": [re.sub(r"[^A-Za-z0-9._-]+", "_", channel.name) for channel in request.channels],
        "pattern": "*.nii.gz" if len(request.size) == 3 else "*.*",
        "datalist": _datalist(len(request.entries)),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "network": "$@network_def.to(@device)",
        **({"upside_down": {"_target_": "Flip", "spatial_axis": 2}} if len(request.size) == 3 else {}),
        "statistics": _statistics(),
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(request)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        **(_segmenting(request) if segments else _classifying(request)),
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "initialize": ["$monai.utils.set_determinism(seed=0)"],
        "run": ["$@evaluator.run()"],
    }


def _datalist(channels: int) -> str:
    """Files, or for several channels folders that hold one file a channel, named by it."""
    if channels == 1:
        return "$sorted(glob.glob(os.path.join(@dataset_dir, @pattern)))"
    return (
        "$[[sorted(glob.glob(os.path.join(d, c + '.*')))[0] for c in @channels] "
        "for d in sorted(glob.glob(os.path.join(@dataset_dir, '*', '')))]"
    )


def _statistics() -> str:
    """A function: one channel -> (median, robust spread), as `archives.statistics` takes them.

    The array is transposed first: of large images every n-th value counts, in the order of our axes.
    """
    kept = f"c.T.ravel()[numpy.isfinite(c.T.ravel())][:: max(1, -(-c.size // {MAX_SAMPLES}))]"
    pair = f"(float(p[1]), float(p[2] - p[0]) / {NORMAL_SPAN} or float(v.std()) or 1.0)"
    return f"$lambda c: (lambda v: (lambda p: {pair})(numpy.percentile(v, (5, 50, 95))))({kept})"


def _preprocessing(request: Request) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"_target_": "LoadImaged", "keys": IMAGE}]
    steps.append({"_target_": "EnsureChannelFirstd", "keys": IMAGE})
    steps.append({"_target_": "EnsureTyped", "keys": IMAGE, "dtype": "$torch.float32"})
    if len(request.size) == 3:
        steps.append(_slice_order())
    steps.append(_scaling(request))
    # NaN means "not known", which is 0 in model units.
    steps.append({"_target_": "SignalFillEmptyd", "keys": IMAGE, "replacement": 0.0})
    if request.distance is not None and len(request.size) == 3:  # pictures do not say their spacing
        steps.append(
            {
                "_target_": "Spacingd",
                "keys": IMAGE,
                "pixdim": list(request.distance[::-1]),
                "mode": "bilinear",
                "padding_mode": "border",
            }
        )
    # The inferer would pad on both sides; `predict` pads at the end.
    steps.append({"_target_": "SpatialPadd", "keys": IMAGE, "spatial_size": list(request.size[::-1]), "method": "end"})
    return steps


def _slice_order() -> dict[str, Any]:
    """Turn a DICOM series whose slices run against their normal; the answer's affine says so, as that of `predict`.

    MONAI's reader stacks slices by instance number, ours in order along the normal (first axis x second axis). NIfTI
    has its own order of slices, which both keep: only DICOM's readers leave its orientation (0020,0037) in the header.
    """
    against = "any(k in x.meta for k in ('00200037', '0020|0037')) and numpy.linalg.det(x.affine[:3, :3]) < 0"
    return {
        "_target_": "Lambdad",
        "keys": IMAGE,
        "func": f"$lambda x, f=@upside_down: f(x) if {against} else x",
    }


def _scaling(request: Request) -> dict[str, Any]:
    entries, ones = request.entries, ", None" * len(request.size)
    lambdad = {"_target_": "Lambdad", "keys": IMAGE}
    if all(entry.method == "image" for entry in entries):
        own = f"*torch.tensor([f(c) for c in x.array]).T[:, :{ones}]"
        return {**lambdad, "func": f"$lambda x, f=@statistics: (lambda m, s: (x - m) / s)({own})"}
    if request.per_image:
        raise ConfigError(
            "some channels are scaled by each image's own statistics and others by fixed numbers, which a MONAI bundle "
            "is not written for; take --to onnx or --to torch"
        )
    if len(entries) == 1 and entries[0].value_range is not None:
        (entry,), (low, high) = entries, entries[0].value_range
        return {
            "_target_": "ScaleIntensityRanged",
            "keys": IMAGE,
            "a_min": low,
            "a_max": high,
            "b_min": (low - entry.center) / entry.scale,
            "b_max": (high - entry.center) / entry.scale,
            "clip": True,
        }
    most = 3.0e38  # within fp32
    ranges = [entry.value_range or (-most, most) for entry in entries]
    table = [[low, high, e.center, e.scale] for (low, high), e in zip(ranges, entries, strict=True)]
    clipped = "torch.minimum(torch.maximum(x, t[0]), t[1])"
    return {**lambdad, "func": f"$lambda x, t=torch.tensor({table}).T[:, :{ones}]: ({clipped} - t[2]) / t[3]"}


def _segmenting(request: Request) -> dict[str, Any]:
    saved = {
        "_target_": "SaveImaged",
        "keys": PRED,
        "output_dir": "@output_dir",
        "output_ext": ".nii.gz",
        "output_postfix": "seg",
        "output_dtype": "$numpy.uint8",
        "separate_folder": False,
        "data_root_dir": "@dataset_dir",
        "resample": False,
    }
    back = {
        "_target_": "Invertd",
        "keys": PRED,
        "transform": "@preprocessing",
        "orig_keys": IMAGE,
        "nearest_interp": False,
        "to_tensor": True,
    }
    return {
        "inferer_def": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(request.size[::-1]),
            "sw_batch_size": WINDOWS,
            "overlap": 0.5,
            "mode": "gaussian",
            "sigma_scale": SIGMA,
        },
        "window_weight": _window_weight(request),
        # MONAI's own weight is cut off at the corners where ours is along each axis.
        "inferer": "$setattr(@inferer_def, 'roi_weight_map', @window_weight) or @inferer_def",
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [back, {"_target_": "AsDiscreted", "keys": PRED, "argmax": True}, saved],
        },
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
    }


def _window_weight(request: Request) -> str:
    """An expression of `heads.tiling.blending_weight`, (1, 1, x, y[, z])."""
    size, letters = list(request.size[::-1]), "ijk"[: len(request.size)]
    line = f"torch.exp(-0.5 * ((torch.arange(s).double() - (s - 1) / 2) / ({SIGMA} * s)) ** 2)"
    inside = f"((g / g.max() - {AT_MARGIN}) / {1 - AT_MARGIN}).clamp(min={LEAST_WEIGHT})"
    lines = f"*[(lambda g: {inside})(line(s)) for s in {size}]"
    product = f"torch.einsum('{','.join(letters)}->{letters}', {lines})"
    return f"$(lambda line: {product}.float()[None, None])(lambda s: {line})"


def _classifying(request: Request) -> dict[str, Any]:
    size = list(request.size[::-1])
    axes = list(zip("ijk", size, strict=False))
    loops = " ".join(f"for {name} in f(x.shape[{axis + 2}], {length})" for axis, (name, length) in enumerate(axes))
    place = ", ".join(f"{name} : {name} + {length}" for name, length in axes)
    windows = f"[n(x[:, :, {place}]) {loops}]"
    return {
        "starts": "$lambda s, w: [0] if s <= w else [n * (s - w) // (-(-s // w) - 1) for n in range(-(-s // w))]",
        "inferer": f"$lambda x, n, *a, f=@starts, **k: torch.stack({windows}).mean(dim=0)",
        "postprocessing": {"_target_": "Compose", "transforms": [{"_target_": "EnsureTyped", "keys": PRED}]},
        "handlers": [
            {"_target_": "StatsHandler", "iteration_log": False, "output_transform": "$lambda x: None"},
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "filename": "predictions.csv",
                "batch_transform": "$lambda x: [i['image'].meta for i in x]",
                "output_transform": "$monai.handlers.from_engine(['pred'])",
            },
        ],
    }
