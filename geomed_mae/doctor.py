"""The verb doctor: can this machine do the work, and if not, what is missing?"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

EXTRAS = {
    "rasterio": "geo",
    "pydicom": "med",
    "highdicom": "med",
    "nibabel": "med",
    "openjpeg": "med",
    "rle": "med",
    "jpeg_ls": "med",
    "gdcm": "med",
    "albumentations": "train",
    "monai": "train",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pystac": "export",
    "transformers": "export",
}
"""Importable name -> extra that installs it."""

DISTRIBUTIONS = {
    "openjpeg": "pylibjpeg-openjpeg",
    "rle": "pylibjpeg-rle",
    "jpeg_ls": "pyjpegls",
    "gdcm": "python-gdcm",
}
"""Importable name -> distribution, where they differ."""

LOW_DISK_GB = 5.0
"""Below this a pretraining run may not fit its checkpoints."""


def doctor() -> dict[str, Any]:
    """Return versions, devices and what is missing; `problems` is empty on a machine that can do everything."""
    problems = []
    packages = {}
    for name, extra in EXTRAS.items():
        distribution = DISTRIBUTIONS.get(name, name)
        try:
            packages[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            packages[distribution] = None
            problems.append(f"{distribution} is not installed: pip install 'geomed-mae[{extra}]'")
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    if free_gb < LOW_DISK_GB:
        problems.append(f"only {free_gb:.1f} GB are free on the disk of the current folder")
    torch_report = _torch(problems)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "disk_free_gb": round(free_gb, 1),
        **torch_report,
        "packages": packages,
        "problems": problems,
    }


def _torch(problems: list[str]) -> dict[str, Any]:
    """Look at torch, its pairing with torchvision, and the devices; add what is wrong to `problems`."""
    import torch  # seconds long, and only this verb of the light ones needs it

    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        problems.append(
            f"timm does not import ({error}): torch and torchvision must match in version and build; "
            "install both from one index, as requirements.lock does"
        )
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "timm": importlib.metadata.version("timm"),
        "cuda_devices": devices,
        "bf16": bool(devices) and torch.cuda.is_bf16_supported(),
    }
