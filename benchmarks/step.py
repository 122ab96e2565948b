"""Time of one training step (forward and backward) beside transformers' ViTMAE, as ratios from one interleaved run.

    python benchmarks/step.py                                    # ViT-S at 224, 3 channels, fp32
    python benchmarks/step.py --size base --precision bf16 --channels 3 12
    python benchmarks/step.py --crop 96 96 96 --channels 1        # volumes, which the peer does not take
    python benchmarks/step.py --compile --curve 200               # eager against compiled, in time and in loss

Variants: `published` is transformers' ViTMAE, `exact` ours with the same objective (target `patch`, no statistics
head), `default` ours with per-channel targets and the statistics head, `fast_25` and `fast_50` ours with the
cross-attention decoder that is asked for a quarter and half of all patches: another objective, and called so. All have
decoders of the same width and 8 blocks. More channels are compared with the peer's model of that many channels.

Ratios are medians over rounds of published / ours in CPU time (wall time on a GPU) and in wall time, with their
quartiles: steps of all variants take turns, because a machine's speed drifts. `cost_of_channels` is the time of a step
over that of the same variant with the fewest channels. `gemm_share` is the share of the matrix products' rate, measured
in the same run, that the FLOPs of the formula in `flops` make up.

Measured, torch 2.14, one thread of an Intel Xeon with avx512_bf16 and without AMX, where products in bf16 run at *half*
the rate of fp32 (88 against 160 GFLOP/s), 224 x 224, 7 rounds, other processes on the second core:

    CPU time, published / ours [quartiles]   exact               default             fast_25
    ViT-S fp32, 3 channels                   1.02 [1.01, 1.04]   1.03 [1.02, 1.04]   1.92 [1.84, 1.97]
    ViT-S fp32, 12 channels                  1.05 [1.00, 1.08]   1.14 [1.10, 1.15]   2.01 [2.00, 2.05]
    ViT-S bf16, 3 channels                   1.17 [1.15, 1.23]   1.18 [1.12, 1.22]   2.09 [2.04, 2.18]
    ViT-S bf16, 12 channels                  1.20 [1.09, 1.25]   1.29 [1.19, 1.33]   2.19 [2.14, 2.24]
    ViT-B fp32, 3 channels                   1.03 [1.00, 1.06]   1.07 [0.97, 1.17]   1.69 [1.67, 1.80]
    ViT-B bf16, 3 channels                   1.08 [1.06, 1.11]   1.11 [1.08, 1.12]   1.79 [1.76, 1.80]
    time of 12 channels over 3, fp32; bf16   1.14; 1.14          1.06; 1.06          1.08; 1.12

ViT-B in bf16 is short of the 1.15 that was hoped for: of the peer's 11.5 CPU seconds a step the linear layers, the same
in both, take 9.0 on this CPU, attention 1.4 (ours 0.7) and all else 1.1 (0.9). 96^3 volumes (ViT-S, batch 2): 3.5 per
second, fast_50 4.3; 200 channels: 1.3 and 1.7 images per second. 200 compiled steps (`--size tiny --crop 64 64 --batch
4`) stay within 1e-6 of the eager losses. No GPU was at hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from geomed_mae.image import Channel
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, MaskPlan, plan_masks
from geomed_mae.models.patches import patch_grid
from geomed_mae.models.spec import SIZES, ModelSpec

RATIO, PATCH = 0.75, 16
DECODERS = {"tiny": (256, 8, 8), "small": (256, 8, 8), "base": (512, 8, 16), "large": (512, 8, 16)}
"""Width, depth and heads: MAE's for ViT-B and ViT-L, CrossMAE's for ViT-S."""

VARIANTS: dict[str, tuple[dict[str, Any], float | None]] = {
    "exact": ({"target": "patch", "stats_weight": 0.0}, None),
    "default": ({}, None),
    "fast_25": ({"mode": "fast"}, 0.25),
    "fast_50": ({"mode": "fast"}, 0.5),
}
"""Changes of the spec, and the predict ratio."""


class Step(Protocol):
    """One model with its input; calling it computes a loss.

    Attributes:
        pixels: the input (b, c, *s).
        flops: of one forward and backward pass of the batch; 0 where unknown.
    """

    pixels: Tensor
    flops: float

    def __call__(self) -> Tensor:
        """Return the loss under the next mask."""


def bands(count: int) -> tuple[Channel, ...]:
    """Return `count` optical channels of distinct wavelengths."""
    return tuple(
        Channel(name=f"b{n}", kind="optical", unit="reflectance", wavelength_nm=450 + 2000 * n / count, bandwidth_nm=10)
        for n in range(count)
    )


class Ours:
    """Our model in one of the VARIANTS."""

    def __init__(self, variant: str, size: str, pixels: Tensor, *, compiled: bool) -> None:
        changes, predict_ratio = VARIANTS[variant]
        (dim, depth, heads), (width, blocks, decoder_heads) = SIZES[size], DECODERS[size]
        axes = pixels.ndim - 2
        self.spec = ModelSpec(
            dim=dim,
            depth=depth,
            heads=heads,
            **{f"patch_{axes}d": (PATCH,) * axes},
            decoder_dim=width,
            decoder_depth=blocks,
            decoder_heads=decoder_heads,
            **changes,
        )
        self.model = MaskedAutoencoder.from_spec(self.spec).to(pixels.device)
        self.run = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.pixels, self.valid = pixels, torch.ones_like(pixels, dtype=torch.bool)
        self.channels = bands(pixels.shape[1])
        self.floor = torch.full((pixels.shape[1],), 0.05, device=pixels.device)
        grid = patch_grid(pixels.shape[2:], self.spec.patch(axes))
        every = torch.ones(len(pixels), int(torch.tensor(grid).prod()), dtype=torch.bool)
        masking = Masking(ratio=RATIO, predict_ratio=predict_ratio)
        self.plans = (plan_masks(every, masking, (0, step)).to(pixels.device) for step in itertools.count())
        values = pixels.shape[1] * PATCH**axes
        images = len(pixels) * flops(self.spec, next(self.plans), every.shape[1], values)
        self.flops = images + weights_flops(self.spec, values)

    def __call__(self) -> Tensor:
        """Return the loss under the next mask."""
        return self.run(self.pixels, self.valid, self.channels, None, next(self.plans), floor=self.floor).loss


class Published:
    """transformers' ViTMAE of the same size."""

    def __init__(self, size: str, pixels: Tensor, *, compiled: bool) -> None:
        (dim, depth, heads), (width, blocks, decoder_heads) = SIZES[size], DECODERS[size]
        config = ViTMAEConfig(
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            image_size=pixels.shape[-1],
            patch_size=PATCH,
            num_channels=pixels.shape[1],
            norm_pix_loss=True,
            mask_ratio=RATIO,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=blocks,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=4 * width,
        )
        model = ViTMAEForPreTraining(config).to(pixels.device)
        self.run = torch.compile(model, dynamic=False) if compiled else model
        self.pixels = pixels
        self.flops = 0.0

    def __call__(self) -> Tensor:
        """Return the loss under a fresh mask."""
        return self.run(self.pixels).loss


def flops(spec: ModelSpec, plan: MaskPlan, tokens: int, patch_values: int) -> float:
    """Return the FLOPs of forward and backward of one image: matrix products alone, 2 per multiplication.

    A block costs 12 d^2 per token and 2 n d for its attention; the backward pass is twice the forward pass, without the
    gradient of the pixels (Hoffmann et al., arXiv 2203.15556, appendix F). What the decoder's last block leaves out is
    counted, 1 % of ViT-B.
    """
    visible, asked = plan.visible.shape[1], plan.asked.shape[1]
    seen, width = visible + 1, spec.decoder_dim
    embed = visible * patch_values * spec.dim
    encoder = spec.depth * (seen * 12 * spec.dim**2 + 2 * seen**2 * spec.dim)
    if spec.mode == "exact":
        queries = tokens + 1
        decoder = spec.decoder_depth * (queries * 12 * width**2 + 2 * queries**2 * width)
    else:
        decoder = spec.decoder_depth * (asked * 10 * width**2 + seen * 2 * width**2 + 2 * asked * seen * width)
    rest = seen * spec.dim * width + asked * width * patch_values
    return 2 * (3 * (encoder + decoder + rest) + 2 * embed)


def weights_flops(spec: ModelSpec, patch_values: int) -> float:
    """Return the FLOPs of making filters and predictions of all channels from shared ones, once a step."""
    return 2 * 3 * patch_values * spec.basis * (spec.dim + spec.decoder_dim)


def gemm_rate(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Return FLOPs per CPU second (wall second on a GPU) and per wall second of a large product: best of five."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [timed(lambda: a @ b, cuda=device != "cpu") for _ in range(6)][1:]
    return tuple(2 * size**3 / min(entry[kind] for entry in times) for kind in (0, 1))


def timed(work: Callable[[], Any], *, cuda: bool) -> tuple[float, float]:
    """Return CPU seconds (wall seconds of a GPU) and wall seconds of `work`."""
    if cuda:
        torch.cuda.synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize()
    wall = time.perf_counter() - start
    return (wall if cuda else time.process_time() - start_cpu), wall


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all variants at all numbers of channels in turn; one entry a number of channels."""
    cuda = options.device != "cpu"
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    steps: dict[tuple[int, str], Step] = {}
    for channels in options.channels:
        pixels = torch.randn(options.batch, channels, *options.crop, device=options.device)
        if len(options.crop) == 2 and options.crop[0] == options.crop[1]:
            steps[channels, "published"] = Published(options.size, pixels, compiled=options.compile)
        for name in options.variants:
            steps[channels, name] = Ours(name, options.size, pixels, compiled=options.compile)

    def once(step: Step) -> tuple[float, float]:
        def work() -> None:
            with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
                loss = step()
            loss.backward()

        return timed(work, cuda=cuda)

    for step in steps.values():
        for _ in range(2):
            once(step)
    rounds = [{key: once(step) for key, step in steps.items()} for _ in range(options.rounds)]
    rate = gemm_rate(dtype, options.device)
    lines: list[dict[str, Any]] = [{"channels": channels} for channels in options.channels]
    for key, step in steps.items():
        lines[options.channels.index(key[0])][key[1]] = _line(key, step, rounds, rate)
    return lines


Rounds = Sequence[dict[tuple[int, str], tuple[float, float]]]


def _line(key: tuple[int, str], step: Step, rounds: Rounds, rate: Sequence[float]) -> dict[str, Any]:
    own = [entry[key] for entry in rounds]
    line: dict[str, Any] = {
        "images_per_second": round(len(step.pixels) / median(wall for _, wall in own), 2),
        "cpu_seconds": round(median(cpu for cpu, _ in own), 3),
    }
    if step.flops:
        line["gemm_share"] = round(step.flops / median(cpu for cpu, _ in own) / rate[0], 2)
    channels, name = key
    peer, fewest = (channels, "published"), (min(other for other, _ in rounds[0]), name)
    if peer in rounds[0] and name != "published":
        line["speedup_cpu"], line["speedup_wall"] = (_ratio(rounds, peer, key, kind) for kind in (0, 1))
    if fewest != key:
        line["cost_of_channels"] = _ratio(rounds, key, fewest, 0)
    return line


def _ratio(rounds: Rounds, above: tuple[int, str], below: tuple[int, str], kind: int) -> list[float]:
    """Return median and quartiles of paired ratios; `kind` 0 is CPU time, 1 wall time."""
    ratios = [entry[above][kind] / entry[below][kind] for entry in rounds]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
    return [round(value, 3) for value in (median(ratios), low, high)]


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Train the first variant eagerly and compiled from the same weights, and compare the losses.

    Every step has crops of its own and the rate warms up, as in training. A model that learns four images by heart at
    full rate blows rounding up: two eager runs whose weights differ by 1e-7 are then between 0.02 % and 280 % apart
    after 200 steps, and 0.0006 % as it is here.
    """
    shape = (options.batch, options.channels[0], *options.crop)
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        step = Ours(options.variants[0], options.size, torch.empty(shape, device=options.device), compiled=compiled)
        optimizer = torch.optim.AdamW(step.model.parameters(), lr=1e-3)
        losses[compiled] = []
        for number in range(options.curve):
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            step.pixels = torch.nn.functional.avg_pool2d(drawn, 9, 1, 4).to(options.device) * 9
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (number + 1) / 20)
            loss = step()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[compiled].append(float(loss.detach()))
    apart = [abs(a - b) / a for a, b in zip(losses[False], losses[True], strict=True)]
    return {
        "steps": options.curve,
        "largest_relative_difference": max(apart),
        "first_loss": losses[False][0],
        "last_loss": losses[False][-1],
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--crop", type=int, nargs="+", default=[224, 224])
    parser.add_argument("--channels", type=int, nargs="+", default=[3])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile all models, the peer too")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="compare losses of eager and compiled")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {"options": vars(options), "torch": torch.__version__}
    if options.curve:
        result["curve"] = curve(options)
    else:
        result["shapes"] = measure(options)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
