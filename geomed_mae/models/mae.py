"""The masked autoencoder (He et al., arXiv 2111.06377) for images with any channels, in 2D or 3D.

An encoder sees the visible patches, a light decoder sees its output and mask tokens, and the loss compares the
decoder's pixels of the hidden patches with the image's. Four things differ from the paper, each with a switch back:
channels enter and leave through codes of their physics (`patch_embed`), targets are normalised per patch and channel
over valid pixels (`targets`), a statistics head predicts what that normalisation removes, and the decoder may be one
of cross-attention (`decoder`). With `mode="exact"`, `target="patch"`, `stats_weight=0` and three channels, loss and
gradients are the published ones (tests/models/test_mae.py).

Shapes: b batch, c channel, n patch of the grid, v visible, h asked for, p pixel of a patch, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from geomed_mae.image import Channel
from geomed_mae.models.decoder import Decoder, Prediction
from geomed_mae.models.masking import MaskPlan
from geomed_mae.models.patches import clean, patchify, select, unpatchify
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.targets import Target, mean_of_samples, normalisation, patch_targets
from geomed_mae.models.vit import Encoder


@dataclass(frozen=True, slots=True)
class MAEOutput:
    """Loss to minimise, its parts (`pixels`, `mean`, `log_sigma`: unweighted, detached), and the prediction."""

    loss: Float[Tensor, ""]
    parts: dict[str, Tensor]
    prediction: Prediction


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder, injected; `from_spec` builds both."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.spec = encoder.spec

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> MaskedAutoencoder:
        """Build the model with random weights from torch's global generator."""
        return cls(Encoder(spec), Decoder(spec))

    def forward(
        self,
        pixels: Float[Tensor, "b c *space"],
        valid: Bool[Tensor, "#b #c *space"],
        channels: Sequence[Channel],
        spacing: Float[Tensor, "b axes"] | None,
        plan: MaskPlan,
        *,
        floor: Float[Tensor, "#b c"] | Float[Tensor, " c"],
    ) -> MAEOutput:
        """Return the loss of one masked batch; arguments as in `Encoder.forward`, `floor` as in `patch_targets`.

        Raises:
            ConfigError: as `Encoder.forward`.
        """
        # `plan` holds the random mask: the encoder sees the visible patches alone ...
        encoded = self.encoder(pixels, valid, channels, spacing, plan)
        # ... the decoder gets its tokens, and one mask token for each patch that is asked for ...
        prediction = self.decoder(encoded, channels, spacing, plan)
        # ... and what it answers is compared with these patches, normalised.
        return self.loss(prediction, self.target(pixels, valid, plan, floor))

    def target(
        self,
        pixels: Float[Tensor, "b c *space"],
        valid: Bool[Tensor, "#b #c *space"],
        plan: MaskPlan,
        floor: Float[Tensor, "#b c"] | Float[Tensor, " c"],
    ) -> Target:
        """Return what the decoder is asked for: the hidden patches, normalised, in fp32."""
        patch = self.spec.patch(pixels.ndim - 2)
        asked = select(patchify(valid.expand(pixels.shape), patch), plan.asked)
        if plan.asked_pad is not None:
            asked = asked & ~plan.asked_pad[..., None, None]
        if plan.shown_channels is not None and plan.crossed:
            hidden, crossed = asked.split([asked.shape[1] - plan.crossed, plan.crossed], dim=1)
            asked = torch.cat([hidden, crossed & ~plan.shown_channels[:, None, :, None]], dim=1)
        patches = clean(select(patchify(pixels.float(), patch), plan.asked), asked)
        with torch.autocast(pixels.device.type, enabled=False):
            return patch_targets(patches, asked, floor.float().reshape(-1, pixels.shape[1]), self.spec.target)

    def loss(self, prediction: Prediction, target: Target) -> MAEOutput:
        """Return the mean squared error over valid pixels of hidden patches, plus the weighted statistics' error.

        Each sample's own mean counts the same, so that the loss of a batch is the mean of those of its parts. In fp32
        whatever autocast says: in bf16 this loss was seen shifted by more than 1 elsewhere. Statistics, which have
        heavy tails, enter with a Huber loss.
        """
        with torch.autocast(prediction.pixels.device.type, enabled=False):
            error = (prediction.pixels.float() - target.pixels).square()
            mean = F.smooth_l1_loss(prediction.mean.float(), target.mean, reduction="none")
            log_sigma = F.smooth_l1_loss(prediction.log_sigma.float(), target.log_sigma, reduction="none")
            parts = {
                "pixels": mean_of_samples(error, target.valid),
                "mean": mean_of_samples(mean, target.counted),
                "log_sigma": mean_of_samples(log_sigma, target.counted),
            }
            loss = parts["pixels"] + self.spec.stats_weight * (parts["mean"] + parts["log_sigma"])
        return MAEOutput(loss, {name: part.detach() for name, part in parts.items()}, prediction)

    @torch.no_grad()
    def reconstruct(
        self,
        pixels: Float[Tensor, "b c *space"],
        valid: Bool[Tensor, "#b #c *space"],
        channels: Sequence[Channel],
        spacing: Float[Tensor, "b axes"] | None,
        plan: MaskPlan,
        *,
        floor: Float[Tensor, "#b c"] | Float[Tensor, " c"],
    ) -> Float[Tensor, "b c *space"]:
        """Return the image in model units with each hidden patch replaced by its prediction.

        Normalisation is undone with the statistics head's mean and sigma. A model trained without that head
        (`stats_weight` 0) is given the true ones, as in the paper's figures. Visible patches, and patches that are
        neither shown nor asked for, are copied, with 0 where invalid.
        """
        prediction = self.decoder(self.encoder(pixels, valid, channels, spacing, plan), channels, spacing, plan)
        if self.spec.stats_weight == 0:
            target = self.target(pixels, valid, plan, floor)
            center, scale = target.center, target.scale
        else:
            rows = floor.float().reshape(-1, pixels.shape[1])
            center, scale = normalisation(prediction.mean.float(), prediction.log_sigma.float(), rows, self.spec.target)
        hidden = plan.asked.shape[1] - plan.crossed
        answer = (prediction.pixels.float() * scale + center)[:, :hidden]
        patch = self.spec.patch(pixels.ndim - 2)
        image = patchify(clean(pixels, valid), patch).float()
        spare = F.pad(image, (0, 0, 0, 0, 0, 1))  # one more patch, where padding entries go
        place = plan.asked if plan.asked_pad is None else plan.asked.masked_fill(plan.asked_pad, image.shape[1])
        spare.scatter_(1, place[:, :hidden, None, None].expand_as(answer), answer)
        grid = tuple(size // step for size, step in zip(pixels.shape[2:], patch, strict=True))
        return unpatchify(spare[:, :-1], grid, patch)
