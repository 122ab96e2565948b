"""Request: what is asked of an exporter, checked once for all targets.

An exported model is for one list of channels; its positions are of one spacing; and it takes every pixel as valid. What
it is fed is the same for all targets that take physical values: channels whose numbers mean something (reflectance, HU,
dB, 8-bit values) go in as they are, and are clipped and scaled inside. Channels that are scaled by each image's own
median and spread (MR, X-ray: contract method `image`) go in **scaled already**, `(value - median) / spread` with the
statistics of the whole image: the model sees a window of it and cannot know them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomed_mae.archives.seen import PRETRAINING
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel, Image
from geomed_mae.models.contract import ChannelContract
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import GROUND_KINDS

if TYPE_CHECKING:
    from geomed_mae.heads.task_model import TaskModel
    from geomed_mae.models.mae import MaskedAutoencoder

VOLUME_KINDS = ("ct", "mr", "pet")
"""Kinds whose images are volumes where the encoder takes images and volumes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What is to be exported; `ask` makes one that holds together.

    Attributes:
        encoder: the encoder; of a fine-tuned run its fine-tuned one.
        task: the fine-tuned model; None where the encoder alone is exported.
        mae: encoder and decoder of the pretraining run, where the decoder was asked for; else None.
        mask_ratio: share of patches that the pretraining run hid.
        tuned: whether the encoder has been fine-tuned; true wherever there is a task model.
        modality: of the images.
        entries: the channels of the exported model's input, in order; a task model's own.
        size: of its input, pixels (rows, columns) or voxels (slices, rows, columns), a multiple of the patch.
        spacing: between pixels along each axis, m (rasters) or mm; None where positions count patches or the
            encoder's reference is meant (`distance` says which).
        image: a real image of the user's to compare on, with these channels alone; None takes the package's scene.
    """

    encoder: PretrainedEncoder
    task: TaskModel | None = None
    mae: MaskedAutoencoder | None = None
    mask_ratio: float = 0.75
    tuned: bool = False
    modality: str
    entries: tuple[ChannelContract, ...]
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    image: Image | None = None

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Channels with their physics, in the order of the input."""
        return tuple(entry.channel for entry in self.entries)

    @property
    def patch(self) -> tuple[int, ...]:
        """Pixels or voxels of a patch per axis."""
        return self.encoder.spec.patch(len(self.size))

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches per axis of an input of `size`."""
        return tuple(length // step for length, step in zip(self.size, self.patch, strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks whose maps are read, from 0: those of the task model's head, or the last."""
        return (self.encoder.spec.depth - 1,) if self.task is None else self.task.layers

    @property
    def per_image(self) -> bool:
        """Whether channels go in scaled already, because each image's own statistics scale them."""
        return any(entry.method == "image" for entry in self.entries)

    @property
    def learned(self) -> bool:
        """Whether positions are a learned table, which is of one grid."""
        return self.encoder.spec.learned_positions is not None

    @property
    def distance(self) -> tuple[float, ...] | None:
        """Distance between pixels that the model is for, m or mm per axis; None where positions count patches."""
        return self.spacing or _reference(self.encoder, self.channels, len(self.size))

    @property
    def pretrained(self) -> bool:
        """Whether the weights began as a pretrained encoder's, as far as is known."""
        seen = self.encoder.seen
        if seen is None:
            return not self.tuned
        return PRETRAINING in (*(part.what for part in seen.parts), *seen.unrecorded)

    @property
    def on_ground(self) -> bool:
        """Whether images are rasters, with distances in metres; those of volumes and planes are in mm."""
        return len(self.size) == 2 and all(channel.kind in GROUND_KINDS for channel in self.channels)


def ask(
    encoder: PretrainedEncoder,
    *,
    task: TaskModel | None = None,
    mae: MaskedAutoencoder | None = None,
    mask_ratio: float = 0.75,
    tuned: bool = False,
    modality: str | None = None,
    channels: Sequence[str] | None = None,
    size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    image: Image | None = None,
) -> Request:
    """Settle what is exported.

    Args:
        encoder: as in Request.
        task: as in Request.
        mae: as in Request.
        mask_ratio: as in Request.
        tuned: as in Request.
        modality: whose channels the model takes; None takes the task model's, or the only one that the encoder knows.
        channels: their names in the order of the input; None takes all of the modality's. A task model's are its own.
        size: input size in pixels or voxels; None takes the crop of training.
        spacing: metres for rasters and mm for others; None takes the encoder's reference.
        image: as in Request; its channels are selected by name.

    Raises:
        ConfigError: unknown modality or channel, a size that is no multiple of the patch, a spacing that is not one
            positive number an axis or that positions that count patches cannot tell from another, or an image of
            another modality, unit or number of axes.
    """
    modality = modality or (task.spec.modality if task is not None else _only_modality(encoder))
    entries = _entries(encoder, modality, channels) if task is None else _own_entries(task, modality, channels)
    if task is None:
        size = tuple(size or _default_size(encoder, entries))
    else:
        size = tuple(size or task.spec.crop)
        if len(size) != len(task.spec.crop):
            raise ConfigError(
                f"--size {','.join(map(str, size))}: the model was fine-tuned on {len(task.spec.crop)}D images; give "
                "as many numbers"
            )
    if len(size) not in (2, 3):
        raise ConfigError(f"--size {','.join(map(str, size))}: give rows,columns for images or slices,rows,columns")
    patch = encoder.spec.patch(len(size))
    if any(length % step or length < step for length, step in zip(size, patch, strict=True)):
        raise ConfigError(f"size {list(size)} is not a multiple of the patch {list(patch)}; choose another --size")
    if spacing is not None:
        _check_spacing(encoder, entries, size, spacing)
    return Request(
        encoder=encoder,
        task=task,
        mae=mae,
        mask_ratio=mask_ratio,
        tuned=tuned or task is not None,
        modality=modality,
        entries=entries,
        size=size,
        spacing=None if spacing is None else tuple(spacing),
        image=None if image is None else _matching(encoder, image, modality, entries, len(size)),
    )


def _only_modality(encoder: PretrainedEncoder) -> str:
    known = sorted({entry.modality for entry in encoder.contract.channels})
    if len(known) > 1:
        raise ConfigError(f"the encoder knows {', '.join(known)}; choose one with --modality")
    return known[0]


def _entries(encoder: PretrainedEncoder, modality: str, names: Sequence[str] | None) -> tuple[ChannelContract, ...]:
    known = {entry.channel.name: entry for entry in encoder.contract.of(modality)}
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"--channels {unknown}: modality '{modality}' has {list(known)} in the encoder's contract")
    return tuple(known[name] for name in names or known)


def _own_entries(task: TaskModel, modality: str, names: Sequence[str] | None) -> tuple[ChannelContract, ...]:
    if modality != task.spec.modality:
        raise ConfigError(
            f"--modality {modality}: the model was fine-tuned on '{task.spec.modality}'; leave the option out"
        )
    if names is not None and tuple(names) != task.spec.channels:
        raise ConfigError(
            f"--channels {','.join(names)}: the head was trained with {','.join(task.spec.channels)} in this order, "
            "and takes no others; leave the option out"
        )
    return task.entries


def _default_size(encoder: PretrainedEncoder, entries: Sequence[ChannelContract]) -> tuple[int, ...]:
    contract = encoder.contract
    volumes = contract.crop_3d is not None and (
        contract.crop_2d is None or all(entry.channel.kind in VOLUME_KINDS for entry in entries)
    )
    crop = contract.crop_3d if volumes else contract.crop_2d
    if crop is None:
        raise ConfigError("the encoder's contract states no crop; give --size")
    return crop


def _reference(encoder: PretrainedEncoder, channels: Sequence[Channel], axes: int) -> tuple[float, ...] | None:
    """Return the spacing that positions are relative to, None where they count patches."""
    return encoder.spec.reference(channels, axes) if encoder.spec.learned_positions is None else None


def _check_spacing(
    encoder: PretrainedEncoder, entries: Sequence[ChannelContract], size: Sequence[int], spacing: Sequence[float]
) -> None:
    if len(spacing) != len(size) or not all(0 < step < math.inf for step in spacing):
        raise ConfigError(
            f"spacing {list(spacing)} does not fit the size {list(size)}; give one positive number (metres or mm) for "
            "each axis"
        )
    if _reference(encoder, [entry.channel for entry in entries], len(size)) is None:
        raise ConfigError(
            f"spacing {list(spacing)} means nothing to this encoder, whose positions count patches; export without it"
        )


def _matching(
    encoder: PretrainedEncoder, image: Image, modality: str, entries: Sequence[ChannelContract], axes: int
) -> Image:
    """Return the image with the channels that are exported, after making sure that it can be compared on."""
    names = tuple(entry.channel.name for entry in entries)
    have = [channel.name for channel in image.channels]
    if image.modality != modality or len(image.spatial_shape) != axes:
        raise ConfigError(
            f"--image is a {len(image.spatial_shape)}D image of modality '{image.modality}', the export is for {axes}D "
            f"images of '{modality}'; give one of these, or leave --image out"
        )
    if missing := [name for name in names if name not in have]:
        raise ConfigError(f"--image lacks the channels {missing}, it has {have}; give another, or leave --image out")
    image = image.select(names)
    encoder.contract.entries(modality, image.channels)
    if not image.valid.any():
        raise ConfigError("--image has no valid pixel; give another, or leave --image out")
    return image
