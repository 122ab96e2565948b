"""Time of one training step (forward and backward) beside transformers' ViTMAE, as ratios from one interleaved run.

    python benchmarks/step.py --size small --batch 16 --rounds 5

Ours runs the same objective (target `patch`, no statistics head, three channels) and our default one (per-channel
targets with the statistics head). CPU time on a CPU, because other processes make wall time there a lottery; the median
of paired ratios, because the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from geomed_mae.modalities import load_modality
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, plan_masks, valid_tokens
from geomed_mae.models.spec import SIZES, ModelSpec

IMAGE, PATCH, RATIO = 224, 16, 0.75
DECODER = {"dim": 512, "depth": 8, "heads": 16}
RGB = load_modality("rgb").channels


def ours(size: str, target: str, stats_weight: float, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that computes our loss of one freshly masked batch."""
    dim, depth, heads = SIZES[size]
    spec = ModelSpec(
        dim=dim,
        depth=depth,
        heads=heads,
        patch_2d=(PATCH, PATCH),
        decoder_dim=DECODER["dim"],
        decoder_depth=DECODER["depth"],
        decoder_heads=DECODER["heads"],
        target=target,
        stats_weight=stats_weight,
    )
    model = MaskedAutoencoder.from_spec(spec).to(pixels.device)
    valid = torch.ones_like(pixels, dtype=torch.bool)
    floor = torch.full((len(RGB),), 0.05, device=pixels.device)
    token_valid = valid_tokens(valid, (PATCH, PATCH)).cpu()
    steps = iter(range(1_000_000))

    def loss() -> torch.Tensor:
        plan = plan_masks(token_valid, Masking(ratio=RATIO), (0, next(steps))).to(pixels.device)
        return model(pixels, valid, RGB, None, plan, floor=floor).loss

    return loss


def published(size: str, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that computes the loss of transformers' ViTMAE of the same size."""
    dim, depth, heads = SIZES[size]
    config = ViTMAEConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        image_size=IMAGE,
        patch_size=PATCH,
        norm_pix_loss=True,
        mask_ratio=RATIO,
        decoder_hidden_size=DECODER["dim"],
        decoder_num_hidden_layers=DECODER["depth"],
        decoder_num_attention_heads=DECODER["heads"],
        decoder_intermediate_size=4 * DECODER["dim"],
    )
    model = ViTMAEForPreTraining(config).to(pixels.device)
    return lambda: model(pixels).loss


def seconds(step: Callable[[], torch.Tensor], *, cuda: bool) -> float:
    """Return the time of one forward and backward pass: CPU seconds, or wall seconds of a CUDA device."""
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    step().backward()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Print one JSON object: seconds per step and ratios (published / ours; above 1 is faster than the peer)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda = options.device.startswith("cuda")
    pixels = torch.randn(options.batch, len(RGB), IMAGE, IMAGE, device=options.device)
    steps = {
        "published": published(options.size, pixels),
        "ours_same_objective": ours(options.size, "patch", 0.0, pixels),
        "ours_default": ours(options.size, "patch_channel", 1.0, pixels),
    }
    for step in steps.values():
        seconds(step, cuda=cuda)
    rounds = [{name: seconds(step, cuda=cuda) for name, step in steps.items()} for _ in range(options.rounds)]
    result = {
        "options": vars(options),
        "torch": torch.__version__,
        "seconds": {name: median(entry[name] for entry in rounds) for name in steps},
        "speedup": {
            name: median(entry["published"] / entry[name] for entry in rounds) for name in steps if name != "published"
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
