"""A run that starts from a fixed-channel model: its own channels exactly, others by wavelength."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality, modality_names
from geomed_mae.models.channels import CODE_WIDTH, ChannelCodes, blend
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.foreign.fixed import meet, start
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.patch_embed import ChannelHeads, ChannelPatchEmbed
from geomed_mae.models.spec import ModelSpec
from geomed_mae.pretrain import adapted
from tests.make_published import vit_mae

RGB = load_modality("rgb").channels
S2 = load_modality("sentinel2-l2a").channels
SHAPE = {"dim": 48, "depth": 2, "heads": 3, "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2}
SPEC = ModelSpec(**SHAPE, patch_2d=(8, 8), basis=8, target="patch", stats_weight=0.0)


def band(wavelength_nm: float, name: str = "x") -> Channel:
    return Channel(name=name, kind="optical", wavelength_nm=wavelength_nm, bandwidth_nm=20.0)


def embedding(spec=SPEC, others=()):
    """Return a patch embedding that has taken over a random RGB kernel for RGB and `others`, and the kernel."""
    embed, kernel = ChannelPatchEmbed(spec), torch.randn(48, 3, 8, 8)
    embed.load_kernel(RGB, kernel, torch.zeros(48), others)
    return embed, kernel


def test_shares_are_linear_in_wavelength_and_constant_beyond_the_ends():
    wanted = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0.5, 0.5], [0, 1, 0], [0.25, 0.75, 0], [1, 0, 0], [1, 0, 0]])
    got = blend(RGB, [band(nm) for nm in (400, 464, 506.5, 549, 564.5, 611, 2200)])
    assert torch.allclose(got, wanted.double())


def test_channels_without_a_wavelength_share_equally_those_of_their_kind_or_all():
    radar = Channel(name="VH", kind="sar", polarisation="VH")
    other = Channel(name="VV", kind="sar", polarisation="VV")
    assert torch.allclose(blend(RGB, [radar]), torch.full((1, 3), 1 / 3).double())
    assert blend([*RGB, other], [radar]).tolist() == [[0, 0, 0, 1]]
    assert blend([other], [band(600)]).tolist() == [[1]]


def test_a_band_between_two_known_ones_has_a_kernel_between_theirs():
    bands = (band(500, "a"), band(530, "b"), band(580, "c"))
    embed, kernel = embedding(others=[bands])
    folded = embed.fold(bands, (8, 8))[0]
    for place, (low, high) in enumerate(((2, 1), (2, 1), (1, 0))):
        ends = torch.stack([kernel[:, low], kernel[:, high]])
        got = folded[:, place]
        assert (got >= ends.min(0).values - 1e-5).all() and (got <= ends.max(0).values + 1e-5).all()
    nearer_green = (folded[:, 1] - kernel[:, 1]).norm() < (folded[:, 0] - kernel[:, 1]).norm()
    assert nearer_green and not torch.allclose(folded[:, 0], kernel[:, 2], atol=0.1)


def test_a_band_at_a_known_wavelength_has_its_kernel():
    bands = tuple(band(known.wavelength_nm, known.name) for known in RGB)
    embed, kernel = embedding(others=[bands])
    assert torch.allclose(embed.fold(bands, (8, 8))[0], kernel, atol=1e-5)


def test_rgb_stays_exact_whatever_else_is_given_filters():
    packaged = [load_modality(name).channels for name in modality_names()]
    hyperspectral = tuple(band(400 + 10 * place, f"b{place}") for place in range(200))
    embed, kernel = embedding(others=[*filter(None, packaged), hyperspectral])
    assert torch.allclose(embed.fold(RGB, (8, 8))[0], kernel, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in modality_names() if 0 < len(load_modality(name).channels) <= CODE_WIDTH]
)
def test_every_packaged_modality_gets_the_blend_that_is_stated(name):
    channels = load_modality(name).channels
    embed, kernel = embedding(others=[channels])
    weights = blend(RGB, channels).float() * (3 / len(channels))
    longest = weights.mul(len(channels) ** 0.5 / 3**0.5).norm(dim=1).clamp(min=1)
    wanted = torch.einsum("ck,dkyx->dcyx", weights / longest[:, None], kernel)
    if name != "rgb":
        assert torch.allclose(embed.fold(channels, (8, 8))[0], wanted, atol=1e-4)


@pytest.mark.parametrize("channels", [S2, load_modality("ct").channels], ids=["sentinel2", "ct"])
def test_an_image_whose_channels_are_all_the_same_is_embedded_like_a_grey_rgb_image(channels):
    embed, _ = embedding(others=[channels])
    blended = embed.fold(channels, (8, 8))[0].sum(1)
    shares = blend(RGB, channels).mean(0)
    if len(set(shares.tolist())) == 1:  # equal shares: the very same tokens
        assert torch.allclose(blended, embed.fold(RGB, (8, 8))[0].sum(1), atol=1e-4)
    assert 0.5 < blended.norm() / embed.fold(RGB, (8, 8))[0].sum(1).norm() < 2


def test_bands_that_cannot_all_be_met_are_met_nearly():
    bands = tuple(band(400 + 10 * place, f"b{place}") for place in range(60))
    embed, kernel = embedding(others=[bands])
    wanted = torch.einsum("ck,dkyx->dcyx", blend(RGB, bands).float() * (3 / 60), kernel)
    cosine = torch.nn.functional.cosine_similarity(embed.fold(bands, (8, 8))[0], wanted, dim=0)
    assert cosine.mean() > 0.8


def test_predictions_of_new_channels_are_blended_too():
    heads = ChannelHeads(SPEC)
    weight, bias = torch.randn(3, 64, 64), torch.randn(3, 64)
    heads.load_kernel(RGB, weight, bias, axes=2, others=[S2])
    tokens = torch.randn(1, 4, 64)
    known = heads(tokens, RGB, (8, 8))[..., :64]
    assert torch.allclose(known, torch.einsum("bhd,cpd->bhcp", tokens, weight) + bias, atol=1e-4)
    wanted = torch.einsum("nc,bhcp->bhnp", blend(RGB, S2).float(), known)
    assert torch.allclose(heads(tokens, S2, (8, 8))[..., :64], wanted, atol=1e-3)


def test_too_few_basis_filters_are_an_error_that_says_how_many():
    spec = ModelSpec(**SHAPE, patch_2d=(8, 8), basis=3)
    embedding(spec)
    with pytest.raises(ConfigError, match=r"other channels beside 3 known ones need 4 basis filters or more: raise"):
        embedding(spec, others=[S2])


def test_more_channels_than_codes_can_tell_apart_are_an_error():
    bands = [band(400 + 10 * place, f"b{place}") for place in range(70)]
    with pytest.raises(
        ConfigError, match=r"these 70 channels cannot all be given filters of their own: at most 64 can"
    ):
        ChannelCodes(128).pin(bands)


def test_features_of_rgb_images_survive_the_extension_to_other_channels(tmp_path):
    theirs = vit_mae()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    mae = MaskedAutoencoder.from_spec(SPEC).eval()
    start(mae, load_encoder(tmp_path).origin, [S2, load_modality("ct").channels])
    theirs.config.mask_ratio = 0.0
    pixels = torch.randn(2, 3, 32, 32)
    valid = torch.ones_like(pixels, dtype=torch.bool)
    with torch.no_grad():
        wanted = theirs.vit(pixels, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        assert torch.allclose(mae.encoder(pixels, valid, RGB).tokens, wanted, atol=1e-4)


def test_an_opened_encoder_can_meet_other_channels_and_keeps_its_own(tmp_path):
    vit_mae().save_pretrained(tmp_path, safe_serialization=True)
    encoder = load_encoder(tmp_path)
    embed, kernel = encoder.module.patch_embed, encoder.origin.kernel
    meet(encoder, [RGB])
    meet(encoder, [RGB, S2])
    assert torch.allclose(embed.fold(RGB, (8, 8))[0], kernel, atol=1e-5)
    wanted = torch.einsum("ck,dkyx->dcyx", blend(RGB, S2).float() * (3 / 12), kernel)
    assert torch.allclose(embed.fold(S2, (8, 8))[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": "fast"}, "the decoder starts at random: model.mode is fast"),
        ({"decoder_depth": 3}, "the decoder starts at random: the recipe's has width 64, 3 blocks, 2 heads"),
        ({}, "the decoder starts from the one of model.init"),
    ],
)
def test_the_log_says_where_the_decoder_starts(tmp_path, caplog, changes, text):
    vit_mae().save_pretrained(tmp_path, safe_serialization=True)
    mae = MaskedAutoencoder.from_spec(ModelSpec(**{**SHAPE, **changes}, patch_2d=(8, 8)))
    with caplog.at_level("INFO", logger="geomed_mae"):
        start(mae, load_encoder(tmp_path).origin, [S2])
    assert text in caplog.text


def test_a_decoder_with_learned_positions_needs_a_table_for_them(tmp_path, caplog):
    theirs = vit_mae()
    torch.nn.init.normal_(theirs.decoder.decoder_pos_embed)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    source = load_encoder(tmp_path)
    with caplog.at_level("INFO", logger="geomed_mae"):
        start(MaskedAutoencoder.from_spec(SPEC), source.origin, [RGB])
    assert "the decoder starts at random: the one of model.init has learned positions, for which" in caplog.text
    fitting = adapted(SPEC, source)
    assert fitting.learned_decoder_positions == (4, 4) and fitting.learned_positions is None
    mae = MaskedAutoencoder.from_spec(fitting)
    start(mae, source.origin, [RGB])
    assert torch.equal(mae.decoder.pos_embed, theirs.decoder.decoder_pos_embed)
    with pytest.raises(ConfigError, match=r"a recipe that starts from it has model.patch_2d alone"):
        adapted(replace(SPEC, patch_3d=(2, 4, 4)), source)
    other = replace(SPEC, decoder_depth=3)
    assert adapted(other, source).learned_decoder_positions is None, "a decoder that does not fit is not taken"


def test_a_recipe_of_volumes_takes_the_blocks_alone(tmp_path, caplog):
    theirs = vit_mae()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    mae = MaskedAutoencoder.from_spec(ModelSpec(**SHAPE, patch_3d=(2, 8, 8)))
    before = mae.encoder.patch_embed.filters["3d"].clone()
    with caplog.at_level("INFO", logger="geomed_mae"):
        start(mae, load_encoder(tmp_path).origin, [load_modality("ct").channels])
    assert torch.equal(before, mae.encoder.patch_embed.filters["3d"])
    assert torch.equal(mae.encoder.norm.weight, theirs.vit.layernorm.weight)
    assert "model.init is of 2D images, the recipe has no such patch" in caplog.text
