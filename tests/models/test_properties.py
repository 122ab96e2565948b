"""What published models for many channels got wrong, held against this one; each with its oracle or counterexample.

Where each property is proven:

1. Codes of positions and of bands are separable: here; physics of one kind in test_channels.py.
2. A token depends on its patch's pixels alone: here (gradients, and the decoder's target is the same patch).
3. Variance at the start does not depend on the number of channels: here, real correlated bands included.
4. Invalid pixels and patches never enter: test_mae.py (loss and gradients), test_vit.py (tokens), test_pretrained.py
   (features); here (positions, vectors), tests/training/test_validity.py (the whole objective on a batch).
5. Flat patches do not dominate the loss: here, on real slices too; single patches in test_targets.py.
6. Unseen wavelengths between known ones give features between theirs: here.
7. A missing descriptor is an error: here, for every kind of channel.
8. Folding into a plain ViT: tests/exporters/test_fold.py and test_timm.py.
9. Two hundred channels: here.
10. The order of channels does not matter: here in both modes; test_patch_embed.py and test_vit.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import geomed_mae as gm
from geomed_mae.errors import ConfigError
from geomed_mae.image import CHANNEL_KINDS, Channel, Image, PlaneGeometry, RasterGeometry, VolumeGeometry
from geomed_mae.modalities import load_modality, modality_names
from geomed_mae.models import channels as channel_codes
from geomed_mae.models.channels import CODE_WIDTH, ChannelCodes
from geomed_mae.models.contract import ChannelContract, Contract, contract_entries, normalise, scaling
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, MaskPlan, plan_masks, valid_tokens
from geomed_mae.models.patch_embed import ChannelHeads, ChannelPatchEmbed
from geomed_mae.models.patches import patchify
from geomed_mae.models.positions import position_table
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.targets import patch_targets
from geomed_mae.models.vit import Encoder

S2 = load_modality("sentinel2-l2a").channels
SEPARABLE = 0.95
"""Largest cosine between the coefficients of two channels of one image; seen over 24 seeds: 0.84."""

CLOSE_PAIRS = [("B04", "B05"), ("B08", "B8A"), ("B8A", "B09")]
FLOOR = torch.tensor([0.05])


def everything(pixels: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(pixels, dtype=torch.bool)


def band(wavelength_nm: float, width_nm: float = 10.0) -> Channel:
    return Channel(name=f"w{wavelength_nm:g}nm", kind="optical", wavelength_nm=wavelength_nm, bandwidth_nm=width_nm)


def hyperspectral(count: int, step_nm: float = 10.0) -> tuple[Channel, ...]:
    return tuple(band(400 + step_nm * index, step_nm) for index in range(count))


def coefficients(channels: Sequence[Channel], seed: int, basis: int = 32) -> torch.Tensor:
    """Return what a model of this seed combines its filters with, at the start."""
    torch.manual_seed(seed)
    return ChannelCodes(basis)(channels).detach().double()


def largest_cosine(rows: torch.Tensor) -> float:
    rows = F.normalize(rows.double(), dim=-1)
    return float((rows @ rows.T).fill_diagonal_(-1).max())


# 1. Separable codes


def clay_table(side: int, width: int) -> torch.Tensor:
    """Clay 1.5's posemb_sincos_2d_with_gsd at 1 m: the exponent is divided by the width a second time."""
    rows, columns = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    quarter = width // 4
    omega = 1.0 / 10000 ** (2 * torch.arange(quarter).double() / (quarter - 1) / width)
    y, x = rows.flatten()[:, None] * omega, columns.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def far_cosine(table: torch.Tensor, places: torch.Tensor) -> tuple[float, float]:
    """Return the largest cosine of patches at least 2 units apart, and min of (1 - cosine) / distance^2 within 1."""
    anchors = torch.linspace(0, len(table) - 1, 9).long()  # sin-cos codes depend on differences alone: a few will do
    rows = F.normalize(table.double(), dim=-1)
    cosine = rows[anchors] @ rows.T
    distance = torch.cdist(places[anchors], places)
    near = (distance > 0) & (distance <= 1)
    slope = ((1 - cosine) / distance.clamp(min=1e-9).square())[near]
    return float(cosine[distance >= 2].max()), float(slope.min()) if near.any() else math.inf


@pytest.mark.parametrize("width", [192, 384, 768, 1024])
@pytest.mark.parametrize(
    ("grid", "ratio"),
    [
        ((14, 14), (1.0, 1.0)), ((32, 32), (1.0, 1.0)), ((3, 50), (2.0, 0.5)), ((14, 14), (0.2, 0.2)),
        ((14, 14), (5.0, 5.0)), ((8, 24, 24), (1.0, 1.0, 1.0)), ((8, 24, 24), (5.0, 1.0, 1.0)),
        ((8, 24, 24), (0.2, 0.4, 0.4)),
    ],
)  # fmt: skip
def test_codes_of_distinct_positions_are_separable(grid, ratio, width):
    table = position_table(grid, width, spacing=torch.tensor([ratio]), reference=(1.0,) * len(grid))[0]
    axes = [torch.arange(count).double() * step for count, step in zip(grid, ratio, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))
    far, slope = far_cosine(table, places)
    assert far < 0.975  # 0.953 in 2D and 0.968 in 3D, along one axis
    assert slope > 0.008  # patches d <= 1 units apart differ by 0.8 % d^2 or more, along every axis


def test_the_bound_on_positions_finds_the_fault_of_a_published_table():
    places = torch.cartesian_prod(torch.arange(32).double(), torch.arange(32).double())
    assert far_cosine(clay_table(32, 768), places)[0] > 0.99


def published_code(wavelength_nm: float | None) -> list[float]:
    """Sines and cosines of the wavelength in micrometres, base 10000, as several published models feed it."""
    angles = [(wavelength_nm or 0.0) / 1000 / 10000 ** (index / 64) for index in range(64)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


@pytest.mark.parametrize("pair", CLOSE_PAIRS)
def test_neighbouring_bands_of_sentinel2_have_separable_coefficients(pair, monkeypatch):
    channels = [channel for channel in S2 if channel.name in pair]
    ours = [largest_cosine(coefficients(channels, seed)) for seed in range(20)]
    assert max(ours) < SEPARABLE and np.mean(ours) < 0.9
    monkeypatch.setattr(channel_codes, "wavelength_code", published_code)
    monkeypatch.setattr(channel_codes, "_encode_once", channel_codes._encode)
    theirs = [largest_cosine(coefficients(channels, seed)) for seed in range(20)]
    assert max(theirs) > SEPARABLE and np.mean(theirs) > 0.93  # all but one band to the model


@pytest.mark.parametrize("modality", modality_names())
def test_every_pair_of_channels_of_a_packaged_modality_is_separable(modality):
    channels = load_modality(modality).channels or tuple(Channel(name=f"band{number}") for number in range(1, 9))
    if len(channels) > CODE_WIDTH:
        channels = channels[::20]  # a hyperspectral imager's neighbours see nearly the same
    assert max(largest_cosine(coefficients(channels, seed)) for seed in range(12)) < SEPARABLE


# 2. A token's own patch


@pytest.mark.parametrize(
    ("space", "count"), [((16, 16), 3), ((16, 8), 40), ((4, 8, 8), 1), ((6, 4, 8), 5)]
)  # patches of 8 x 4 and 2 x 4 x 4
def test_a_token_has_gradients_on_its_own_patch_alone_and_the_target_is_that_patch(spec, space, count):
    mae = MaskedAutoencoder.from_spec(replace(spec, target="none"))
    patch, channels = spec.patch(len(space)), hyperspectral(count)
    pixels = torch.randn(1, count, *space, requires_grad=True)
    tokens = mae.encoder.patch_embed(patchify(pixels, patch), channels, patch)
    number = torch.arange(math.prod(space), dtype=torch.float32).reshape(1, 1, *space).expand(1, count, *space)
    for index in range(tokens.shape[1]):
        (gradient,) = torch.autograd.grad(tokens[0, index] @ torch.randn(spec.dim), pixels, retain_graph=True)
        plan = MaskPlan(torch.tensor([[(index + 1) % tokens.shape[1]]]), torch.tensor([[index]]))
        asked = mae.target(number, everything(number), plan, FLOOR.expand(count)).pixels
        own = torch.isin(number, asked)
        assert (gradient[~own] == 0).all() and (gradient[own] != 0).all()


# 3. Variance at the start


def test_variance_at_the_start_does_not_depend_on_the_number_of_independent_channels():
    spec = ModelSpec(dim=64, depth=1, heads=1, patch_2d=(8, 8))
    for seed, count in itertools.product(range(3), (1, 3, 12, 64, 200)):
        torch.manual_seed(seed)
        tokens = ChannelPatchEmbed(spec)(torch.randn(120, 1, count, 64), hyperspectral(count), (8, 8))
        assert 0.9 < tokens.detach().var() < 1.12, count  # 0.95 to 1.07 over six seeds


def model_units(image: Image, size: int) -> torch.Tensor:
    entries = contract_entries(load_modality(image.modality), image.channels, [])
    center, scale, _ = (torch.from_numpy(values)[None] for values in scaling(entries))
    raw = torch.from_numpy(image.array[None, ..., :size, :size].copy())
    valid = torch.from_numpy(np.broadcast_to(image.valid, image.array.shape)[None, ..., :size, :size].copy())
    return normalise(raw, valid, center, scale, [entry.value_range for entry in entries])


@pytest.mark.data
def test_real_bands_correlate_and_add_up_more_but_less_than_if_codes_were_the_same(shared_data):
    image = gm.read_images(shared_data / "sat/terramind/S2L2A/609U_541L_3_0.tif", modality="sentinel2-l2a")[0]
    pixels = model_units(image, 128)
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    assert torch.corrcoef(pixels[0].flatten(1)).mean() > 0.8  # a land scene: nearly one brightness in twelve bands
    spec, patches = ModelSpec(dim=64, depth=1, heads=1, patch_2d=(8, 8)), patchify(pixels, (8, 8))
    embeds = []
    for seed in range(6):
        torch.manual_seed(seed)
        embeds.append(ChannelPatchEmbed(spec))
    means = {
        count: float(np.mean([e(patches[:, :, :count], image.channels[:count], (8, 8)).detach().var() for e in embeds]))
        for count in (1, 3, 12)
    }
    # One code for all twelve would give 0.88 * 12 = 10.6; ours 2.5, or 1.6 times the standard deviation of one band.
    assert 0.7 < means[1] < 1.3 and means[3] < 2.2 and means[12] < 3.5, means


# 4. Nodata never enters (what other files do not show)


@pytest.mark.parametrize("with_plan", [False, True])
@pytest.mark.parametrize("space", [(16, 16), (4, 8, 8)])
def test_the_position_of_an_invalid_patch_reaches_no_token(spec, space, with_plan, monkeypatch):
    encoder, channels = Encoder(spec), hyperspectral(3)
    pixels = torch.randn(2, 3, *space)
    valid = everything(pixels)
    valid[1, ..., :4] = False
    token_valid = valid_tokens(valid, spec.patch(len(space)))
    plan = plan_masks(token_valid, Masking(ratio=0.4), (0, 0)) if with_plan else None
    assert plan is None or plan.visible_pad is not None
    before = encoder(pixels, valid, channels, plan=plan).tokens
    true_positions = encoder.positions
    monkeypatch.setattr(
        encoder, "positions", lambda *args: torch.where(token_valid[..., None], true_positions(*args), 37.0)
    )
    after = encoder(pixels, valid, channels, plan=plan).tokens
    kept = F.pad(token_valid, (1, 0), value=True) if plan is None else ~F.pad(plan.visible_pad, (1, 0))
    assert torch.equal(before[kept], after[kept]) and not torch.equal(before, after)


@pytest.mark.parametrize("junk", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("modality", "geometry", "space"),
    [
        ("sentinel2-l2a", RasterGeometry(None, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (10.0, 10.0)), (32, 24)),
        ("mr-multisequence", VolumeGeometry(np.diag([3.0, 1.0, 1.0, 1.0])), (6, 8, 12)),
        ("xray", PlaneGeometry((0.2, 0.2)), (24, 20)),
    ],
)
def test_invalid_pixels_change_no_bit_of_an_image_vector_or_its_grid(spec, modality, geometry, space, junk):
    channels = load_modality(modality).channels
    rng = np.random.default_rng(0)
    array = rng.random((len(channels), *space), dtype=np.float32)
    method = "image" if modality.startswith("mr") else "fixed"
    entries = tuple(
        ChannelContract(
            modality=modality, channel=channel, method=method, center=0.0, scale=1.0, noise_floor=0.05,
            value_range=None if method == "image" else (0.0, 1.6),
        )
        for channel in channels
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = PretrainedEncoder(
        Encoder(replace(spec, reference_gsd_m=20.0, reference_spacing_mm=(1.0, 1.0, 1.0))),
        Contract(channels=entries, crop_2d=(16, 16), crop_3d=(4, 8, 8)),
    )
    valid = rng.random(array.shape) < 0.8
    valid[..., :8] = False
    dirty = np.where(valid, array, np.float32(junk))
    one, other = (Image(values, valid, channels, geometry, modality) for values in (array, dirty))
    vector, grid = encoder.embed(one), encoder.features(one)
    assert np.array_equal(vector, encoder.embed(other)) and np.isfinite(vector).all()
    assert np.array_equal(grid.array, encoder.features(other).array, equal_nan=True) and not grid.valid.all()


# 5. Flat patches


def share(patches: torch.Tensor, flat: torch.Tensor, floor: float, kind: str) -> float:
    """Return the share of the summed squared target that lies in `flat` patches; patches are (1, n, 1, p)."""
    target = patch_targets(patches, everything(patches), torch.tensor([[floor]]), kind)
    energy = target.pixels.square().sum((-2, -1))
    return float(energy[flat].sum() / energy.sum())


def test_flat_patches_do_not_dominate_the_target_of_a_slice():
    # 40 % at a noise of 5 HU, the others with structure of 200 HU, floor 20 HU; model units of 400 HU.
    sigma = torch.where(torch.arange(500) < 200, 5.0, 200.0)[None, :, None, None] / 400
    patches = sigma * torch.randn(1, 500, 1, 256)
    flat = sigma.flatten(1) < 0.05
    weights = sigma.flatten().square() / (sigma.flatten().square() + 0.05**2)  # of a patch: 1/17 and 0.99
    bound = float(weights[:200].sum() / weights.sum())
    ours, published = (share(patches, flat, 0.05, kind) for kind in ("patch_channel", "patch"))
    assert ours == pytest.approx(bound, rel=0.05) and bound < 0.04
    assert 0.38 < published < 0.42  # their share of the count


@pytest.mark.data
def test_flat_patches_do_not_dominate_the_target_of_real_slices(shared_data):
    volume = gm.read_images(shared_data / "med/ct_abdomen/dicom", modality="ct")[0]
    slices = model_units(volume, 512)[0, 0][:, None]  # twenty slices, each an image
    patches = patchify(slices, (16, 16)).reshape(1, -1, 1, 256)
    flat = patches.std(-1)[..., 0] < 10 / 400
    ours, published = (share(patches, flat, 20 / 400, kind) for kind in ("patch_channel", "patch"))
    assert flat.float().mean() > 0.4  # air and table: noise of 4 HU
    assert ours < 0.05 and published > 0.25  # 0.040 and 0.301


# 6. Unseen wavelengths


def margins(seeds: int) -> torch.Tensor:
    """Return, for gaps between Sentinel-2's bands, how much nearer the middle is to either than they to one another."""
    lines = sorted(channel.wavelength_nm for channel in S2)
    found = []
    for seed in range(seeds):
        for low, high in itertools.pairwise(lines):
            one, middle, other = coefficients([band(low), band((low + high) / 2), band(high)], seed)
            found.append(torch.minimum(one @ middle, middle @ other) - one @ other)
    return torch.stack(found)


def test_coefficients_of_an_unseen_wavelength_lie_between_those_of_its_neighbours():
    found = margins(12)
    assert (found > 0).double().mean() > 0.8 and found.mean() > 0.03


KNOWN = (490.0, 560.0, 665.0, 865.0)


def spectra(seed: int, count: int) -> torch.Tensor:
    """Return images (count, 4, 16, 16) of KNOWN bands whose pixels mix three smooth end members linearly."""
    draw = torch.Generator().manual_seed(seed)
    shares = F.interpolate(torch.randn(count, 3, 4, 4, generator=draw), size=16, mode="bicubic")
    lines = torch.tensor(KNOWN)
    members = torch.stack([torch.ones_like(lines), (lines - 665) / 150, torch.sin(lines / 60)])
    return torch.einsum("neyx,ec->ncyx", shares, members)


@pytest.fixture(scope="module")
def trained() -> list[Encoder]:
    """Encoders of four seeds after 60 steps on KNOWN bands, one or more of which are hidden in each step."""
    return [_trained(seed) for seed in range(4)]


def _trained(seed: int) -> Encoder:
    torch.manual_seed(seed)
    mae = MaskedAutoencoder.from_spec(
        ModelSpec(dim=48, depth=2, heads=3, patch_2d=(4, 4), decoder_dim=32, decoder_depth=1, decoder_heads=1)
    )
    optimizer = torch.optim.AdamW(mae.parameters(), lr=3e-3)
    masking, channels = Masking(ratio=0.5, channel_drop=0.5), [band(line, 30) for line in KNOWN]
    for step in range(60):
        pixels = spectra(step, 8)
        plan = plan_masks(torch.ones(8, 16, dtype=torch.bool), masking, (seed, step), channels=4)
        loss = mae(pixels, everything(pixels), channels, None, plan, floor=FLOOR.expand(4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mae.encoder


def detour(encoder: Encoder, index: int, *, own_pixels: bool) -> float:
    """Return how far the band amid KNOWN band `index` and the next is from the farther of them.

    As a share of the distance of these two, between features: 0.5 is the middle of a line, 1 or more is not between.

    Args:
        encoder: a trained one.
        index: of the band below.
        own_pixels: each band shows its own pixels, the one amid their mean; else all three show that mean, so that
            codes alone differ.
    """
    low, high = spectra(999, 16)[:, index : index + 2].split(1, dim=1)
    middle = (low + high) / 2
    lines = KNOWN[index], (KNOWN[index] + KNOWN[index + 1]) / 2, KNOWN[index + 1]
    with torch.inference_mode():
        one, amid, other = (
            encoder(pixels, everything(pixels), [band(line, 30)]).tokens[:, 1:]
            for pixels, line in zip((low, middle, high) if own_pixels else (middle,) * 3, lines, strict=True)
        )
    return float(max((amid - one).norm(), (amid - other).norm()) / (one - other).norm())


@pytest.mark.parametrize("index", range(3))
def test_after_training_features_of_an_unseen_band_lie_between_those_of_its_neighbours(trained, index):
    found = [detour(encoder, index, own_pixels=True) for encoder in trained]
    assert max(found) < 1 and np.mean(found) < 0.8  # 0.97 and 0.75; the code alone is harder, see below


def test_after_training_the_code_of_an_unseen_band_alone_lies_between_those_of_its_neighbours(trained):
    found = np.array([[detour(encoder, index, own_pixels=False) for index in range(3)] for encoder in trained])
    # 1.08 in one gap of one seed, 0.72 on average; with the transformer's formula in nm up to 1.75 and 0.94.
    assert (found < 1).mean() > 0.9 and found.max() < 1.2 and found.mean() < 0.8


# 7. Missing descriptors

NEEDS = {
    "optical": ({"wavelength_nm": 665.0}, r"channel 'c1' is optical but has no wavelength; give its wavelength_nm"),
    "thermal": ({"wavelength_nm": 10900.0}, r"channel 'c1' is thermal but has no wavelength; give its wavelength_nm"),
    "sar": ({"polarisation": "VV"}, r"channel 'c1' is sar but its polarisation is None; give one of VV, VH, HV, HH"),
    **dict.fromkeys(("elevation", "ct", "mr", "pet", "xray", "ultrasound", "unnamed"), ({}, None)),
}
"""What a kind cannot be without, and what is said where it is missing; no kind is left out (first test)."""


@pytest.mark.parametrize("kind", CHANNEL_KINDS)
def test_a_missing_descriptor_is_an_error_wherever_channels_enter_or_leave(spec, kind):
    descriptors, message = NEEDS[kind]
    mae, pixels = MaskedAutoencoder.from_spec(spec), torch.randn(1, 1, 16, 16)
    plan = plan_masks(torch.ones(1, 8, dtype=torch.bool), Masking(ratio=0.5), (0, 0))
    whole, bare = Channel(name="c1", kind=kind, **descriptors), Channel(name="c1", kind=kind)
    assert torch.isfinite(mae(pixels, everything(pixels), [whole], None, plan, floor=FLOOR).loss)
    entrances = (
        lambda: mae(pixels, everything(pixels), [bare], None, plan, floor=FLOOR),
        lambda: mae.encoder(pixels, everything(pixels), [bare]),
        lambda: mae.encoder.patch_embed.fold([bare], (8, 4)),
        lambda: ChannelHeads(spec)(torch.randn(1, 1, spec.decoder_dim), [bare], (8, 4)),
    )
    for enter in entrances:
        if message is None:
            enter()
        else:
            with pytest.raises(ConfigError, match=message):
                enter()


def test_an_unknown_polarisation_or_kind_is_an_error_too():
    with pytest.raises(ConfigError, match=r"'s0' is sar but its polarisation is 'RH'; give one of VV, VH, HV, HH"):
        ChannelCodes(8)([Channel(name="s0", kind="sar", polarisation="RH")])
    with pytest.raises(ValueError, match=r"channel 'x' has kind 'radar'; known kinds: optical, thermal"):
        Channel(name="x", kind="radar")


@pytest.mark.parametrize("wavelength", [float("nan"), 0.0, -665.0, 0.665])
def test_a_wavelength_that_is_no_wavelength_in_nm_is_an_error(wavelength):
    with pytest.raises(ConfigError, match=r"channel 'red' .* wavelength"):
        ChannelCodes(8)([Channel(name="red", kind="optical", wavelength_nm=wavelength)])


# 9. Two hundred channels


@pytest.mark.parametrize("step_nm", [5.0, 10.0])
def test_codes_of_two_hundred_narrow_bands_are_pairwise_distinct(step_nm):
    channels = hyperspectral(200, step_nm)
    for seed in range(4):
        rows = coefficients(channels, seed)
        assert torch.pdist(rows).min() > 0.01  # of vectors of unit length


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_two_hundred_channels_run_forward_and_backward(spec, mode):
    mae = MaskedAutoencoder.from_spec(replace(spec, mode=mode))
    pixels, channels = torch.randn(2, 200, 16, 16), hyperspectral(200)
    ratio = 0.25 if mode == "fast" else None
    plan = plan_masks(torch.ones(2, 8, dtype=torch.bool), Masking(ratio=0.5, predict_ratio=ratio), (0, 0))
    out = mae(pixels, everything(pixels), channels, None, plan, floor=FLOOR.expand(200))
    out.loss.backward()
    assert out.prediction.pixels.shape == (2, 4 if ratio is None else 2, 200, 32) and torch.isfinite(out.loss)
    gradients = [parameter.grad for parameter in mae.encoder.patch_embed.codes.code.parameters()]
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)


def test_swapping_two_neighbouring_bands_of_two_hundred_changes_features(spec):
    encoder, pixels = Encoder(spec), torch.randn(2, 200, 16, 16)
    swapped = pixels[:, [*range(100), 101, 100, *range(102, 200)]]
    channels = hyperspectral(200, 5.0)
    with torch.inference_mode():
        one, other = (encoder(values, everything(values), channels).tokens for values in (pixels, swapped))
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


# 10. Order


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("space", [(16, 16), (4, 8, 8)])
def test_permuting_channels_with_their_pixels_changes_no_feature_loss_or_prediction(spec, mode, space):
    mae = MaskedAutoencoder.from_spec(replace(spec, mode=mode))
    channels = (
        *S2, Channel(name="VV", kind="sar", polarisation="VV", radar_ghz=5.405), Channel(name="dem", kind="elevation"),
        Channel(name="band7"), Channel(name="band2"),
    )  # fmt: skip
    count = len(channels)
    order = torch.randperm(count).tolist()
    moved = [channels[index] for index in order]
    pixels, floor = torch.randn(2, count, *space), torch.rand(count)
    valid = torch.rand(2, count, *space) < 0.9
    token_valid = valid_tokens(valid, spec.patch(len(space)))
    plan = plan_masks(token_valid, Masking(ratio=0.5, channel_drop=0.3), (0, 0), channels=count)
    moved_plan = replace(plan, shown_channels=plan.shown_channels[:, order])
    with torch.inference_mode():
        features = mae.encoder(pixels, valid, channels).tokens
        assert (mae.encoder(pixels[:, order], valid[:, order], moved).tokens - features).abs().max() < 1e-5
        one = mae(pixels, valid, channels, None, plan, floor=floor)
        other = mae(pixels[:, order], valid[:, order], moved, None, moved_plan, floor=floor[order])
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    assert (other.prediction.pixels - one.prediction.pixels[:, :, order]).abs().max() < 1e-5
