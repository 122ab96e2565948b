"""What a pretraining step computes: a batch in physical units -> model units -> masks -> loss.

Masks and scaling are made on the CPU from the batch and the step number alone, so that `MaskedObjective.loss` is a pure
function of (parameters, batch, step).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geomed_mae.errors import IntegrityError
from geomed_mae.models.contract import Contract, normalise, scaling
from geomed_mae.models.mae import MAEOutput, MaskedAutoencoder
from geomed_mae.models.masking import Masking, MaskPlan, plan_masks, valid_tokens
from geomed_mae.models.patches import patch_grid, unpatchify
from geomed_mae.models.spec import ModelSpec
from geomed_mae.samples.batch import Batch
from geomed_mae.training.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """A batch as the model takes it: `pixels` in model units; center, scale and floor are (b, c)."""

    pixels: Float[Tensor, "b c *s"]
    valid: Bool[Tensor, "b c *s"]
    spacing: Float[Tensor, "b axes"] | None
    center: Float[Tensor, "b c"]
    scale: Float[Tensor, "b c"]
    floor: Float[Tensor, "b c"]
    plan: MaskPlan


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """What a panel shows, in physical units on the CPU.

    Attributes:
        image: the crops (b, c, *s).
        answer: the same with every hidden patch replaced by its prediction.
        seen: pixels of patches that the encoder saw.
        asked: valid pixels of patches that it did not see and the decoder answered for.
    """

    image: Float[Tensor, "b c *s"]
    answer: Float[Tensor, "b c *s"]
    seen: Bool[Tensor, "b 1 *s"]
    asked: Bool[Tensor, "b c *s"]


class MaskedObjective:
    """Binds the model, the contract that scales its input, and the masks.

    `forward` is what computes a step's loss: the model, or what spreads it over processes.
    """

    def __init__(self, mae: MaskedAutoencoder, contract: Contract, *, masking: Masking, seed: int) -> None:
        self.mae, self.contract, self.masking, self.seed = mae, contract, masking, seed
        self.forward: Callable[..., MAEOutput] = mae

    def prepare(self, batch: Batch, step: int, masking: Masking) -> ModelInput:
        """Scale a batch and draw its masks, on the batch's device; each sample's by its number over all processes.

        Raises:
            ConfigError: the contract does not know a channel, or knows it in another unit.
        """
        batch, device = batch.physical(), batch.raw.device
        entries = self.contract.entries(batch.modality, batch.channels)
        center, scale, floor = (
            torch.from_numpy(np.stack(values)).to(device, non_blocking=True)
            for values in zip(*(scaling(entries, own) for own in batch.statistics), strict=True)
        )
        ranges = [entry.value_range for entry in entries]
        patch = self.mae.spec.patch(batch.raw.ndim - 2)
        plan = plan_masks(
            valid_tokens(batch.valid, patch),
            masking,
            (self.seed, step),
            grid=patch_grid(batch.raw.shape[2:], patch),
            samples=batch.samples or None,
            channels=len(batch.channels),
        )
        return ModelInput(
            pixels=normalise(batch.raw, batch.valid, center, scale, ranges),
            valid=batch.valid,
            spacing=batch.spacing,
            center=center,
            scale=scale,
            floor=floor,
            plan=plan.to(device, non_blocking=True),
        )

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one step and its parts."""
        ready = self.prepare(batch, step, self.masking)
        out = self.forward(ready.pixels, ready.valid, batch.channels, ready.spacing, ready.plan, floor=ready.floor)
        return out.loss, {**out.parts, "valid_fraction": batch.valid.float().mean()}

    def reconstruct(self, batch: Batch, step: int) -> Reconstruction:
        """Return crops and the model's answers in physical units.

        All channels are shown to the encoder and all hidden patches are asked for.
        """
        batch = batch.physical()
        ready = self.prepare(batch, step, replace(self.masking, channel_drop=0.0, predict_ratio=None))
        answer = self.mae.reconstruct(
            ready.pixels, ready.valid, batch.channels, ready.spacing, ready.plan, floor=ready.floor
        )
        trailing = (1,) * (batch.raw.ndim - 2)
        center, scale = (value.reshape(*value.shape, *trailing) for value in (ready.center, ready.scale))
        patch = self.mae.spec.patch(batch.raw.ndim - 2)
        seen = _pixels_of(ready.plan.visible, ready.plan.visible_pad, batch.raw.shape, patch)
        asked = _pixels_of(ready.plan.asked, ready.plan.asked_pad, batch.raw.shape, patch) & batch.valid
        # What was not asked for stays the image itself: values that the contract clips would differ without cause.
        physical = torch.where(asked, answer * scale + center, batch.raw)
        return Reconstruction(batch.raw.cpu(), physical.cpu(), seen.cpu(), asked.cpu())


def _pixels_of(
    tokens: Tensor, pad: Tensor | None, shape: Sequence[int], patch: Sequence[int]
) -> Bool[Tensor, "b 1 *s"]:
    """Return the pixels of the patches listed in `tokens`."""
    grid = [size // step for size, step in zip(shape[2:], patch, strict=True)]
    count = int(np.prod(grid))
    # One more place, where padding entries of the list go.
    marks = torch.zeros(shape[0], count + 1, dtype=torch.bool, device=tokens.device)
    marks.scatter_(1, tokens if pad is None else tokens.masked_fill(pad, count), True)
    patches = marks[:, :-1, None, None].expand(-1, -1, 1, int(np.prod(patch)))
    return unpatchify(patches, grid, patch)


def objective_state(objective: MaskedObjective) -> dict[str, Any]:
    """Return what a checkpoint must carry, besides tensors, to rebuild the objective."""
    return {
        "spec": json.loads(objective.mae.spec.to_json()),
        "contract": json.loads(objective.contract.to_json()),
        "masking": asdict(objective.masking),
        "seed": objective.seed,
    }


def restore_objective(checkpoint: Checkpoint) -> MaskedObjective:
    """Rebuild the whole autoencoder, decoder included, from a pretraining checkpoint; in evaluation mode, on the CPU.

    Raises:
        IntegrityError: the checkpoint is not one of pretraining.
    """
    state = checkpoint.state
    try:
        mae = MaskedAutoencoder.from_spec(ModelSpec.from_json(json.dumps(state["spec"])))
        mae.load_state_dict(checkpoint.weights)
        contract = Contract.from_json(json.dumps(state["contract"]))
        drawn = {key: tuple(value) if isinstance(value, list) else value for key, value in state["masking"].items()}
        masking, seed = Masking(**drawn), int(state["seed"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise IntegrityError(f"checkpoint {checkpoint.path.name} holds no masked autoencoder: {error}") from error
    return MaskedObjective(mae.eval(), contract, masking=masking, seed=seed)
