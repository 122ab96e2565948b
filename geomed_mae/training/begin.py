"""What pretraining begins with: the contract that scales each channel, and weights that come from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from geomed_mae.archives.index import Index
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.modalities import Modality, resolve_modalities
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.foreign.fixed import start, why_no_decoder
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import SIZES, ModelSpec
from geomed_mae.samples.buckets import Bucket

log = logging.getLogger(__name__)


def make_contract(recipe: Recipe, index: Index, buckets: Sequence[Bucket]) -> Contract:
    """Settle how each channel of each modality is scaled, from the statistics of all images that have it.

    Raises:
        ConfigError: images of a modality that the recipe does not name.
    """
    modalities = {modality.name: modality for modality in resolve_modalities(recipe.data.modality)}
    entries: dict[tuple[str, str], Any] = {}
    for bucket in buckets:
        modality = _known(modalities, bucket.modality)
        for channel in bucket.channels:
            if (modality.name, channel.name) not in entries:
                own = [
                    (row.statistics[place],)
                    for row in index.rows
                    if row.modality == modality.name
                    for place, other in enumerate(row.channels)
                    if other.name == channel.name
                ]
                entries[modality.name, channel.name] = contract_entries(modality, (channel,), own)[0]
    return Contract(
        channels=tuple(entries.values()),
        crop_2d=recipe.data.crop_2d,
        crop_3d=recipe.data.crop_3d,
        fingerprint=index.fingerprint,
        images=len(index),
        steps=recipe.train.steps,
    )


def _known(modalities: Mapping[str, Modality], name: str) -> Modality:
    if name not in modalities:
        raise ConfigError(
            f"the index holds images of modality '{name}', the recipe reads {sorted(modalities)}; set data.modality to "
            "the name or YAML file that the index was made with"
        )
    return modalities[name]


def adapted(spec: ModelSpec, source: PretrainedEncoder | None) -> ModelSpec:
    """Return the spec with what no recipe sets and an encoder to start from has: norm_eps and learned positions.

    Raises:
        ConfigError: learned positions are of images, and the recipe has volumes too, or the other way round.
    """
    if source is None:
        return spec
    spec, learned = replace(spec, norm_eps=source.spec.norm_eps), source.spec.learned_positions
    of_decoder, origin = None, source.origin
    if origin is not None and origin.decoder is not None and origin.decoder.positions is not None:
        of_decoder = None if why_no_decoder(spec, origin.decoder) else origin.grid
    grid = learned or of_decoder
    if grid is None:
        return spec
    patches = {2: spec.patch_2d, 3: spec.patch_3d}
    if patches.pop(len(grid)) is None:
        return spec  # nothing but blocks will be taken
    if any(patches.values()):
        raise ConfigError(
            f"model.init has a learned table of positions for {len(grid)} spatial axes; a recipe that starts from "
            f"it has model.patch_{len(grid)}d alone"
        )
    return replace(spec, learned_positions=learned, learned_decoder_positions=of_decoder)


def start_from(mae: MaskedAutoencoder, contract: Contract, source: PretrainedEncoder) -> Contract:
    """Copy the weights of a pretrained encoder into `mae`, and return its contract extended by the new channels.

    Channels that it knows keep their scaling. Filters of a kind of patch that it does not have stay random. A model
    that came from elsewhere gives its decoder too, if it fits, and its filters to channels that it does not know
    (`models.foreign.fixed.start`).

    Raises:
        ConfigError: the shapes differ; the keys to change are named.
    """
    have, want = source.spec, mae.spec
    names = ["dim", "depth", "heads", "patch_2d", "patch_3d"] + (["basis"] if source.origin is None else [])
    differ = [
        name
        for name in names
        if getattr(have, name) != getattr(want, name)
        and not (name.startswith("patch") and None in (getattr(have, name), getattr(want, name)))
    ]
    if differ:
        found = "; ".join(f"{name} {getattr(have, name)}, here {getattr(want, name)}" for name in differ)
        raise ConfigError(f"model.init is an encoder with {found}; {_way_out(have, differ)}")
    if source.origin is not None:
        modalities = dict.fromkeys(entry.modality for entry in contract.channels)
        start(mae, source.origin, [[entry.channel for entry in contract.of(name)] for name in modalities])
    else:
        weights, wanted = source.module.state_dict(), set(mae.encoder.state_dict())
        mae.encoder.load_state_dict({**mae.encoder.state_dict(), **{k: v for k, v in weights.items() if k in wanted}})
        log.info("the encoder starts from model.init, the decoder, which encoder folders do not hold, at random")
    return replace(
        source.contract.extended(contract.channels),
        crop_2d=contract.crop_2d or source.contract.crop_2d,
        crop_3d=contract.crop_3d or source.contract.crop_3d,
        fingerprint=contract.fingerprint,
        images=contract.images,
        steps=contract.steps,
    )


def _way_out(have: ModelSpec, differ: Sequence[str]) -> str:
    """Return what to set so that a recipe builds the shape `have`."""
    size = next((name for name, (dim, _, heads) in SIZES.items() if (dim, heads) == (have.dim, have.heads)), None)
    if size is None:
        known = ", ".join(f"{name} {dim} with {heads}" for name, (dim, _, heads) in SIZES.items())
        return f"recipes have the widths and heads of timm's sizes alone ({known}), so no recipe can go on from it"
    keys = [f"model.size={size}"] if {"dim", "heads"} & set(differ) else []
    if "depth" in differ or ("dim" in differ and have.depth != SIZES[size][1]):
        keys.append(f"model.depth={have.depth}")
    for name in ("patch_2d", "patch_3d", "basis"):
        if name in differ:
            keys.append(f"model.{name}={getattr(have, name)}".replace("(", "[").replace(")", "]").replace(" ", ""))
    return f"set {' '.join(keys)}"
