"""What the tests of the heads are given: inputs of any shape, heads by name, whole task models of a few weights."""

from __future__ import annotations

from pathlib import Path

import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.index import Index
from geomed_mae.heads import HeadInputs, HeadSpec, head_module
from geomed_mae.heads.task_model import TaskModel, TaskSpec
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.pretrained import read_out
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder

HEADS = (
    ("linear", "segment"),
    ("convolutional", "segment"),
    ("unetr", "segment"),
    ("linear", "classify"),
    ("attentive", "classify"),
)
"""Every head with every task that it answers."""
CLASSES = ("background", "anterior", "posterior")
EMBED = 24


def inputs(
    patch: tuple[int, ...], grid: tuple[int, ...], *, channels: int = 5, batch: int = 2, maps: int = 1
) -> HeadInputs:
    """Random inputs, everything valid."""
    space = tuple(size * step for size, step in zip(grid, patch, strict=True))
    return HeadInputs(
        maps=tuple(torch.randn(batch, EMBED, *grid) for _ in range(maps)),
        token_valid=torch.ones(batch, *grid, dtype=torch.bool),
        pixels=torch.randn(batch, channels, *space),
        valid=torch.ones(batch, channels, *space, dtype=torch.bool),
    )


def changed(given: HeadInputs, **parts: object) -> HeadInputs:
    """The inputs with some of their parts replaced."""
    return HeadInputs(**{**{name: getattr(given, name) for name in HeadInputs.__slots__}, **parts})


def spec_of(name: str, task: str, patch: tuple[int, ...] = (8, 8), **more: object) -> HeadSpec:
    """A spec of narrow heads."""
    given = {"embed_dim": EMBED, "classes": CLASSES, "channels": 5, "width": 32, **more}
    return HeadSpec(name=name, task=task, patch=patch, **given)


def head(name: str, task: str, patch: tuple[int, ...] = (8, 8), **more: object) -> torch.nn.Module:
    """A head with the weights of seed 0."""
    torch.manual_seed(0)
    return head_module(name, task).build(spec_of(name, task, patch, **more))


def archive(folder: Path, axes: int) -> Index:
    """An index of one Landsat scene of 40 x 48 pixels, or of one MR volume of 16 x 24 x 20 voxels."""
    # Here, so that the tests of heads and losses alone do not import the verbs.
    from tests.scenes import landsat_scene, mr_volume

    if axes == 2:
        landsat_scene(folder / "a.tif", None, shape=(40, 48), nodata=0)
    else:
        mr_volume(folder / "a.nii.gz", None, shape=(20, 24, 16))
    return open_archive([folder], ["landsat7" if axes == 2 else "mr"])


def task_model(index: Index, name: str, task: str, *, crop: tuple[int, ...], **more: object) -> TaskModel:
    """A task model with random weights for the first image of an index; patches of 8 x 8 pixels or 2 x 4 x 4 voxels."""
    row = index.rows[0]
    entries = contract_entries(load_modality(row.modality), row.channels, [row.statistics])
    whole = dict.fromkeys((f"crop_{len(crop)}d",), crop)
    torch.manual_seed(0)
    encoder = Encoder(ModelSpec(dim=EMBED, depth=3, heads=2, patch_2d=(8, 8), patch_3d=(2, 4, 4), basis=4))
    names = tuple(channel.name for channel in row.channels)
    maps = more.pop("maps", len(read_out("several", encoder.spec.depth)))
    spec = spec_of(name, task, encoder.spec.patch(len(crop)), channels=len(names), maps=maps, **more)
    model = TaskModel(
        encoder,
        Contract(channels=entries, **whole),
        TaskSpec(head=spec, modality=row.modality, channels=names, crop=crop),
    )
    return model.eval()
