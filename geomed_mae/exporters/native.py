"""The native export: the encoder folder, or the model folder of a fine-tuned run, without the run around it.

Nothing is folded or left out: any channels of the contract, any size, validity. It opens with `gm.load_encoder`, and
a fine-tuned one with `geomed-mae predict` too. With `--decoder` the weights of the decoder lie beside the encoder's,
under `decoder.`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from geomed_mae.archives.seen import Seen
from geomed_mae.errors import IntegrityError
from geomed_mae.exporters.card import PHYSICAL, README, model_card
from geomed_mae.exporters.folder import building, written
from geomed_mae.exporters.proof import ours, prove, trial
from geomed_mae.exporters.request import Request
from geomed_mae.heads.task_model import load_task_model, write_task_model
from geomed_mae.models.encoder_folder import WEIGHTS, load_encoder, save_encoder

TAKES = ("encoder", "model")
WHOLE = True
"""Nothing is chosen: --modality, --channels, --size and --spacing have no meaning here."""
DECODER = True
"""Takes --decoder."""

EXACT = 0.0
"""The same weights in the same code give the same bits."""


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` as an encoder folder, or as the folder of a task model, open it, and compare.

    Returns:
        folder, files, channels and modality that it was compared with, parity.

    Raises:
        IntegrityError: what was written does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    given, encoder = trial(request), request.encoder
    with building(out) as folder:
        if request.task is None:
            decoder = None if request.mae is None else request.mae.decoder
            save_encoder(folder, encoder.module, encoder.contract, decoder=decoder, seen=encoder.seen)
            opened = replace(request, encoder=load_encoder(folder))
            answers = [ours(one, given).tokens for one in (request, opened)]
            same = opened.encoder.contract == encoder.contract and _has_decoder(folder, decoder)
        else:
            write_task_model(folder, request.task, encoder.seen or Seen.unknown())
            opened = replace(request, task=load_task_model(folder)[0])
            same = opened.task.contract == request.task.contract and opened.task.spec == request.task.spec
            answers = [ours(one, given).probabilities for one in (request, opened)]
            (folder / README).write_text(_card(request), encoding="utf-8")
        what = "tokens" if request.task is None else "probabilities"
        parity = prove(
            "native",
            *answers,
            runtime="geomed-mae",
            compared=f"{what} of {given.source} and of noise",
            tolerance=EXACT,
        )
        if not same:
            raise IntegrityError("the native export does not say what the model takes and gives; nothing was written")
    return {
        "folder": str(out),
        "files": written(out),
        "modality": request.modality,
        "channels": [channel.name for channel in request.channels],
        "parity": parity,
    }


def _has_decoder(folder: Path, decoder: nn.Module | None) -> bool:
    """Return whether a folder holds the very weights of a decoder; true where there is none."""
    stored = load_file(folder / WEIGHTS) if decoder is not None else {}
    own = {} if decoder is None else decoder.state_dict()
    return all(stored[f"decoder.{name}"].equal(tensor.detach().cpu()) for name, tensor in own.items())


def _card(request: Request) -> str:
    opening = """\
The model folder of a fine-tuned run: encoder and head, any size of image, validity respected.

    geomed-mae predict this/folder --archive images/ --out maps/"""
    if request.task.spec.head.task == "classify":
        opening = opening.replace("maps/", "classes/")
    return model_card(
        request, title="Model fine-tuned with geomed-mae", opening=opening, library="geomed-mae", values=PHYSICAL
    )
