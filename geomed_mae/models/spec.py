"""ModelSpec: everything that decides a model's shape and objective, as plain data that travels in `config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from geomed_mae.errors import ConfigError

if TYPE_CHECKING:
    from geomed_mae.config import ModelConfig
    from geomed_mae.image import Channel

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and attention heads of timm's vit_tiny, vit_small, vit_base and vit_large."""

DECODER_HEAD_DIM = 32
"""Width of one attention head of the decoder: 512 / 16 in MAE's (arXiv 2111.06377)."""

CODES = 2
"""Version of `channels.describe`: 1 had wavelengths on a linear axis. Raise it with every change of what it returns."""

MOST_WIDTH, MOST_DEPTH = 1 << 16, 1 << 10
"""Bounds of a spec that is read from a file: far beyond any model."""

MODES = ("exact", "fast")
TARGETS = ("patch_channel", "patch", "none")
GROUND_KINDS = ("optical", "thermal", "sar", "elevation", "unnamed")
"""Kinds whose 2D images are rasters with spacing in metres; those of the other kinds are planes in mm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and objective of a masked autoencoder.

    Attributes:
        dim, depth, heads: width, blocks and attention heads of the encoder.
        patch_2d, patch_3d: patch in pixels (row, column) and voxels (slice, row, column); None where not supported.
        reference_gsd_m: ground sampling distance at which neighbouring patches are one position unit apart.
        reference_spacing_mm: the same for volumes (slice, row, column); planes use the last two.
        basis: number of shared filters that every channel's weights are a combination of.
        decoder_dim, decoder_depth, decoder_heads: the decoder's.
        mode: one of MODES; `exact` has the published decoder, `fast` one of cross-attention (`models.decoder`).
        target: normalisation of targets, one of TARGETS.
        stats_weight: weight of the loss on each patch's mean and log standard deviation.
        learned_positions: grid of a learned table of positions, of encoders that were trained elsewhere; None has
            sines and cosines.
        learned_decoder_positions: the same of the decoder, whose table has an entry for the class token too.
        codes: version of the formula of channel codes; weights of another one mean nothing.
        norm_eps: of every LayerNorm; 1e-6 in ViT's and MAE's released code, other values come with encoders that were
            trained elsewhere.
    """

    dim: int
    depth: int
    heads: int
    patch_2d: tuple[int, int] | None = None
    patch_3d: tuple[int, int, int] | None = None
    reference_gsd_m: float | None = None
    reference_spacing_mm: tuple[float, float, float] | None = None
    basis: int = 32
    decoder_dim: int = 128
    decoder_depth: int = 4
    decoder_heads: int = 4
    mode: str = "exact"
    target: str = "patch_channel"
    stats_weight: float = 1.0
    learned_positions: tuple[int, ...] | None = None
    learned_decoder_positions: tuple[int, ...] | None = None
    norm_eps: float = 1e-6
    codes: int = CODES

    def __post_init__(self) -> None:
        if self.patch_2d is None and self.patch_3d is None:
            raise ConfigError("a model needs a patch: set patch_2d, patch_3d or both")
        if self.mode not in MODES:
            raise ConfigError(f"mode '{self.mode}' is none of {', '.join(MODES)}")
        if self.target not in TARGETS:
            raise ConfigError(f"target '{self.target}' is none of {', '.join(TARGETS)}")
        counts = {"basis": self.basis, "depth": self.depth, "decoder_depth": self.decoder_depth}
        counts |= {f"patch_{len(patch)}d": min(patch) for patch in (self.patch_2d, self.patch_3d) if patch is not None}
        numbers = {"reference_gsd_m": self.reference_gsd_m, "norm_eps": self.norm_eps}
        numbers |= {
            "reference_spacing_mm": None if self.reference_spacing_mm is None else min(self.reference_spacing_mm)
        }
        for name, value in (*counts.items(), *((key, value) for key, value in numbers.items() if value is not None)):
            if not 0 < value < math.inf or (name in counts and value < 1):
                raise ConfigError(f"{name} {getattr(self, name)} is not positive")
        if not 0 <= self.stats_weight < math.inf:
            raise ConfigError(f"stats_weight {self.stats_weight} is not a number of 0 or more")
        for name, width, heads in (
            ("encoder", self.dim, self.heads),
            ("decoder", self.decoder_dim, self.decoder_heads),
        ):
            if width % heads or width % 4:
                raise ConfigError(f"the {name}'s width {width} must be a multiple of its {heads} heads and of 4")

    @classmethod
    def from_config(cls, config: ModelConfig) -> ModelSpec:
        """Translate the `model` section of a recipe.

        Raises:
            ConfigError: a width that heads do not divide.
        """
        dim, depth, heads = SIZES[config.size]
        return cls(
            dim=dim,
            depth=config.depth or depth,
            heads=heads,
            patch_2d=config.patch_2d,
            patch_3d=config.patch_3d,
            reference_gsd_m=config.reference_gsd_m,
            reference_spacing_mm=config.reference_spacing_mm,
            basis=config.basis,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
            decoder_heads=max(1, config.decoder_dim // DECODER_HEAD_DIM),
            mode=config.mode,
            target=config.target,
            stats_weight=config.stats_weight,
        )

    def patch(self, axes: int) -> tuple[int, ...]:
        """Return the patch for images with `axes` spatial axes.

        Raises:
            ConfigError: the model was not made for such images.
        """
        patch = self.patch_2d if axes == 2 else self.patch_3d
        if patch is None:
            made_for = "volumes" if axes == 2 else "2D images"
            raise ConfigError(
                f"this model has no patch for images with {axes} spatial axes: it was made for {made_for} "
                f"(train one with model.patch_{axes}d set)"
            )
        return patch

    def reference(self, channels: Sequence[Channel], axes: int) -> tuple[float, ...] | None:
        """Return the reference spacing per spatial axis (metres for rasters, else mm), or None to count patches."""
        if axes == 2 and all(channel.kind in GROUND_KINDS for channel in channels):
            return None if self.reference_gsd_m is None else (self.reference_gsd_m, self.reference_gsd_m)
        return None if self.reference_spacing_mm is None else self.reference_spacing_mm[-axes:]

    def to_json(self) -> str:
        """Return the spec as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: fields that this version does not know, or that are missing.
        """
        data: dict[str, Any] = json.loads(text)
        if not isinstance(data, dict):
            raise ConfigError("a model spec is missing, or no JSON object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ConfigError(f"a model spec has no field {unknown}; was it written by a newer geomed-mae?")
        if (codes := data.get("codes", 1)) != CODES:
            raise ConfigError(
                f"these weights were trained with version {codes} of the channel codes, this geomed-mae has {CODES}: "
                "their channels would get other filters; train again, or use the version that wrote them"
            )
        try:
            spec = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"the model spec cannot be read: {error}") from error
        spec.check_numbers()
        return spec

    def check_numbers(self) -> None:
        """Make sure that what counts something is a whole number of a sane size: the spec may come from anywhere.

        Raises:
            ConfigError: naming the field.
        """
        limits = {"dim": MOST_WIDTH, "heads": MOST_WIDTH, "basis": MOST_WIDTH, "depth": MOST_DEPTH}
        limits |= {f"decoder_{name}": limits[name] for name in ("dim", "heads", "depth")}
        grids = {"patch_2d": (2,), "patch_3d": (3,)}
        grids |= {"learned_positions": (1, 2, 3), "learned_decoder_positions": (1, 2, 3)}
        numbers = {name: ((getattr(self, name),), limit) for name, limit in limits.items()}
        for name, axes in grids.items():
            if (grid := getattr(self, name)) is not None:
                if not isinstance(grid, tuple) or len(grid) not in axes:
                    raise ConfigError(f"{name} {grid!r} of a model spec does not have {axes[-1]} numbers")
                numbers[name] = (grid, MOST_WIDTH)
        for name, (values, limit) in numbers.items():
            if not all(type(value) is int and 0 < value <= limit for value in values):
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} of a model spec is no whole number from 1 to {limit}"
                )
