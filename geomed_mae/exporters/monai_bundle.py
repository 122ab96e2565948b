"""Export to a MONAI bundle: a fine-tuned model that `monai.bundle run` applies to files, with MONAI alone.

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir IMAGES

The bundle has the network as TorchScript (`models/model.ts`), the transforms before and after it in
configs/inference.json (see `exporters.bundle_config`), and what it takes and gives in configs/metadata.json. Volumes
and planes only: MONAI does not read georeferenced rasters.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geomed_mae.errors import ConfigError, IntegrityError, MissingExtraError
from geomed_mae.exporters.bundle_config import IMAGE, PRED, inference_config
from geomed_mae.exporters.card import CONTRACT, NORMALISED, contract_json, model_card
from geomed_mae.exporters.folder import building, carry_native, outcome
from geomed_mae.exporters.model_units import AxesReversed, in_model_units, reversed_axes
from geomed_mae.exporters.proof import ours, prove, prove_contract, trial
from geomed_mae.exporters.request import Request
from geomed_mae.exporters.torchscript import write_script
from geomed_mae.image import Image, PlaneGeometry, VolumeGeometry

TAKES = ("model",)
TOLERANCE = 1e-5
"""Of probabilities after MONAI's own percentiles, windows and blending in fp32."""

SAME_CLASS = 0.999
"""Least share of pixels that must be of the same class in the file that the bundle writes: the others are ties."""

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
FORMATS = {"ct": ("hounsfield", "CT"), "mr": ("magnitude", "MR"), "pet": ("magnitude", "PT")}
"""Kind of a channel -> (format, modality) in MONAI's metadata; others are "magnitude" of their own kind."""


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` as a MONAI bundle and run it on an image before it gets its name.

    Returns:
        folder, files, channels, input_size, parity, and `same_class`: the share of pixels of the same class in the
        bundle's file and ours (to segment).

    Raises:
        ConfigError: an encoder without a head, a raster, or channels that are scaled in different ways.
        IntegrityError: the bundle does not compute the same; nothing is left behind.
        MissingExtraError: MONAI or pytorch-ignite is not installed.
        OutputError: the folder cannot be written.
    """
    if request.task is None:
        raise ConfigError("a MONAI bundle takes a fine-tuned model, and an encoder has no head; give a run of finetune")
    if request.on_ground:
        raise ConfigError(
            f"MONAI does not read georeferenced rasters such as '{request.modality}'; take --to onnx-qgis, stac-mlm or "
            "onnx"
        )
    _installed()
    config = inference_config(request)
    with building(out) as folder:
        _write(folder, request, config)
        carry_native(request, folder)
        parity, same = _proven(folder, request)
    result = outcome(request, out, parity=parity)
    return result if same is None else {**result, "same_class": same}


def _installed() -> None:
    try:
        import ignite  # noqa: F401  monai's evaluator needs it, and says so only when it runs
        import monai  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the monai-bundle export", error.name or "monai", "train") from error
    if find_spec("nibabel") is None:  # MONAI's saver needs it
        raise MissingExtraError("the monai-bundle export", "nibabel", "med")


def _write(folder: Path, request: Request, config: dict[str, Any]) -> None:
    for name in ("configs", "docs", "models"):
        (folder / name).mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    (folder / "configs" / "metadata.json").write_text(json.dumps(_metadata(request), indent=4), encoding="utf-8")
    (folder / "docs" / "README.md").write_text(_card(request), encoding="utf-8")
    contract = contract_json(request, values=NORMALISED, layout="b c x y" if len(request.size) == 2 else "b c x y z")
    (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
    prove_contract("monai-bundle", folder, request)
    (folder / "LICENSE").write_text(
        "Not stated. Whoever hands this model on decides on it; terms of the training images may bind it too.\n",
        encoding="utf-8",
    )
    example = reversed_axes(trial(request, noise=0).normalised)
    write_script(AxesReversed(in_model_units(request)).eval(), example, folder / "models" / "model.ts")


# ------------------------------------------------------------------------------------------------- what it says


def _metadata(request: Request) -> dict[str, Any]:
    head, size = request.task.spec.head, list(request.size[::-1])
    names = {str(number): name for number, name in enumerate(head.classes)}
    form, modality = FORMATS.get(request.channels[0].kind, ("magnitude", request.channels[0].kind.upper()))
    verb = "Segmentation" if head.task == "segment" else "Classification"
    taken = {
        "type": "image",
        "format": form,
        "modality": modality,
        "num_channels": len(request.entries),
        "spatial_shape": size,
        "dtype": "float32",
        "value_range": _model_range(request),
        "is_patch_data": True,
        "channel_def": {str(number): channel.name for number, channel in enumerate(request.channels)},
    }
    given = {
        "type": "image",
        "format": "segmentation" if head.task == "segment" else "labels",
        "num_channels": len(head.classes),
        "spatial_shape": size if head.task == "segment" else [1, len(head.classes)],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": head.task == "segment",
        "channel_def": names,
    }
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported with geomed-mae"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": version("nibabel"), "pytorch-ignite": version("pytorch-ignite")},
        "name": f"{verb} of {request.modality} images",
        "task": f"{verb} of {request.modality} images into {', '.join(head.classes)}",
        "description": "A vision transformer, pretrained as a masked autoencoder and fine-tuned with geomed-mae."
        if request.pretrained
        else "A vision transformer, trained on labelled images alone with geomed-mae.",
        "authors": "not stated",
        "copyright": "not stated",
        "intended_use": "Research. No diagnostic use has been tested.",
        "network_data_format": {"inputs": {"image": taken}, "outputs": {"pred": given}},
        "input_contract": [_scaling_words(entry) for entry in request.entries],
        "spacing_mm": None if request.distance is None else list(request.distance[::-1]),
    }


def _model_range(request: Request) -> list[float]:
    """Return the lowest and highest value in model units; three spreads where nothing is clipped."""
    pairs = [
        [(limit - entry.center) / entry.scale for limit in entry.value_range]
        for entry in request.entries
        if entry.value_range is not None and entry.method == "fixed"
    ] or [[-3.0, 3.0]]
    return [round(min(low for low, _ in pairs), 6), round(max(high for _, high in pairs), 6)]


def _scaling_words(entry: Any) -> dict[str, Any]:
    own = entry.method == "image"
    return {
        "channel": entry.channel.name,
        "unit": entry.channel.unit,
        "mean": "median of the image" if own else entry.center,
        "std": "(p95 - p5) / 3.29 of the image" if own else entry.scale,
        "clip": None if own else entry.value_range,
    }


def _card(request: Request) -> str:
    segments = request.task.spec.head.task == "segment"
    gives = (
        "NIfTI files of class numbers on the grid of the input, `eval/NAME_seg.nii.gz`"
        if segments
        else "a table of probabilities, `eval/predictions.csv`, one line an image, classes in the order below"
    )
    files = (
        "one file an image in IMAGES, or one folder an image with the files of its DICOM series (`--pattern '*'`)"
        if len(request.entries) == 1
        else "a folder an image in IMAGES, with one file a channel that is named by the channel, all on one grid"
    )
    opening = f"""A MONAI bundle. In this folder, with MONAI and pytorch-ignite installed:

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir IMAGES --output_dir eval

takes {files} (`--pattern` says which files) and writes {gives}.
`python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json --config_file \
configs/inference.json` checks the network. The native model is in `model/`: `geomed_mae.load_encoder` and
`geomed-mae predict` open this folder too."""
    notes = [
        "The transforms of configs/inference.json make this input from files: they are part of the bundle, and arrays "
        "are (channel, x, y, z) there. Nothing is reoriented; slices of a DICOM series are taken in order along their "
        "normal, as in geomed-mae. Windows of the size above lie half a window apart "
        "with a Gaussian weight. In geomed-mae itself, what lies beyond the end of an image that is smaller than a "
        "window is not seen at all; here it is the channel's centre, so that such images may differ a little."
    ]
    if request.distance is not None and len(request.size) == 3:
        notes.append(
            "Volumes are resampled to the spacing above, and the map back to the file's grid. geomed-mae itself does "
            "not resample: it tells the network each file's own spacing, so that volumes of another spacing differ."
        )
    if len(request.size) == 2:
        notes.append(
            "Pictures must be grey, of one channel. MONAI shows DICOM images of MONOCHROME1 as stored, which "
            "geomed-mae turns round: invert these first."
        )
    title = f"{'Segmentation' if segments else 'Classification'} of {request.modality} images, a MONAI bundle"
    return model_card(request, title=title, opening=opening, tags=["monai"], values=NORMALISED, notes=notes)


# --------------------------------------------------------------------------------------------------------- proof


def _proven(folder: Path, request: Request) -> tuple[dict[str, Any], float | None]:
    """Run the bundle on one window as a file; return its parity, and the share of pixels of the same class."""
    first = trial(request, noise=0)
    # The window is the whole image here, so that its statistics scale it on both sides.
    request = replace(request, image=_as_image(request, first.raw[0].numpy()))
    given = trial(request, noise=0)
    wanted = ours(request, given).probabilities
    with tempfile.TemporaryDirectory() as work, _quiet():
        _save(given.raw[0].numpy(), request, Path(work) / "data")
        parser = _parsed(folder, Path(work))
        found = _probabilities(parser)
        parity = prove(
            "monai-bundle",
            reversed_axes(wanted)[0],
            found,
            runtime=f"MONAI {version('monai')}",
            compared=f"probabilities of {first.source}, by the bundle's own transforms and windows",
            tolerance=TOLERANCE,
        )
        parser.get_parsed_content("run")
        if found.ndim == 1:
            return parity, None
        same = float((_loaded(Path(work) / "eval") == found.argmax(dim=0).numpy()).mean())
    if same < SAME_CLASS:
        raise IntegrityError(
            f"the file that the bundle writes agrees with the model in {same:.4f} of its pixels; nothing was written: "
            "please report this with the model's config.json"
        )
    return parity, same


def _as_image(request: Request, array: np.ndarray) -> Image:
    steps = request.distance or (1.0,) * len(request.size)
    if len(request.size) == 2:
        geometry: Any = PlaneGeometry(tuple(steps))
    else:
        affine = np.eye(4)
        affine[:3, :3] = np.fliplr(np.diag(steps[::-1]))
        geometry = VolumeGeometry(affine)
    return Image(array, np.ones((1, *request.size), dtype=bool), request.channels, geometry, request.modality)


def _save(array: np.ndarray, request: Request, folder: Path) -> None:
    """Write an image (c, *size) as the bundle takes it: a file, or a folder with one a channel."""
    from monai.data import NibabelWriter

    names = ["image"] if len(array) == 1 else [f"image/{name}" for name in inference_config(request)["channels"]]
    steps = request.distance or (1.0,) * len(request.size)
    for name, values in zip(names, array, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if values.ndim == 2:
            np.save(path.with_name(f"{path.name}.npy"), values.T)
            continue
        writer = NibabelWriter(output_dtype=np.float32)
        writer.set_data_array(values.T, channel_dim=None)
        writer.set_metadata({"affine": np.diag([*steps[::-1], 1.0])}, resample=False)
        writer.write(path.with_name(f"{path.name}.nii.gz"))


def _parsed(folder: Path, work: Path) -> Any:
    """Return MONAI's parser of the bundle's configuration, set to read and write in `work`."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser.read_meta(str(folder / "configs" / "metadata.json"))
    places = {"bundle_root": folder, "dataset_dir": work / "data", "output_dir": work / "eval"}
    for name, place in places.items():
        parser[name] = str(place)
    parser["device"] = "$torch.device('cpu')"
    return parser


@torch.no_grad()
def _probabilities(parser: Any) -> Float[Tensor, "class *reversed"]:
    """Return what the bundle's transforms, network and windows make of its first file, on that file's grid."""
    preprocessing, inferer, network = (
        parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "network")
    )
    item = preprocessing({IMAGE: parser.get_parsed_content("datalist")[0]})
    answer = inferer(item[IMAGE][None], network.eval())[0]
    if answer.ndim > 1:
        invert = parser.get_parsed_content("postprocessing").transforms[0]
        answer = invert({**item, PRED: answer})[PRED]
    return torch.as_tensor(np.asarray(answer))


def _loaded(folder: Path) -> np.ndarray:
    from monai.transforms import LoadImage

    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return np.squeeze(np.asarray(LoadImage(image_only=True)(path)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MONAI's progress and torch's advice on TorchScript off the terminal."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=FutureWarning)
        # LoadImage makes one of each of its readers, whether a file needs it or not.
        warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
