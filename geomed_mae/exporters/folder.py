"""Where an export is made: a folder beside its place, which gets its name when everything in it is proven.

On any failure nothing is left. MANIFEST.sha256 lists every file, those in folders too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomed_mae.archives.seen import Seen
from geomed_mae.errors import ConfigError, OutputError
from geomed_mae.exporters.request import Request
from geomed_mae.heads.task_model import FOLDER as MODEL_FOLDER
from geomed_mae.heads.task_model import write_task_model
from geomed_mae.models.encoder_folder import PRETRAINED_ON, save_encoder
from geomed_mae.models.manifest import write_manifest

TORCH_WRITER = ("PytorchStreamWriter failed", "unexpected pos")
"""What torch says when it cannot write an archive: it raises RuntimeError, not OSError, on a full disk."""
ENCODER_FOLDER = "encoder"
"""Name of the native encoder's folder in an export, as in a run."""


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `out`; on leaving it whole it gets its manifest and becomes `out`.

    Raises:
        ConfigError: `out` holds something.
        OutputError: it cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"'{out}' is not empty; choose another --out")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        write_manifest(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"the folder '{out}' cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_WRITER):
            raise
        raise OutputError(f"the folder '{out}' cannot be written: the disk is full or the file too large") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def written(out: Path) -> list[str]:
    """Return the names of all files of an export, relative to it, sorted; `files` of a result."""
    return sorted(str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file())


def outcome(request: Request, out: Path, **more: Any) -> dict[str, Any]:
    """Return the result of an export: where and what was written, what it takes, and what the target has to add.

    Args:
        request: what was exported.
        out: the folder that was written.
        more: `parity`, and whatever else a user of the target wants to know; or what is otherwise in this target.
    """
    return {
        "folder": str(out),
        "files": written(out),
        "channels": [entry.channel.name for entry in request.entries],
        "input_size": [len(request.entries), *request.size],
        **more,
    }


def carry_native(request: Request, folder: Path) -> None:
    """Write the native encoder as `folder`/encoder, or the task model as `folder`/model.

    So `load_encoder` opens the export, and nothing that its target has no word for is lost. What the model has seen
    goes with it, but never the private part.
    """
    if request.task is None:
        encoder = request.encoder
        save_encoder(folder / ENCODER_FOLDER, encoder.module, encoder.contract, seen=encoder.seen)
    else:
        write_task_model(folder / MODEL_FOLDER, request.task, request.encoder.seen or Seen.unknown())


def carry_record(request: Request, folder: Path) -> None:
    """Write what the encoder has seen into an export that does not carry the native encoder.

    The weights have seen these images whatever folder they are in.
    """
    if request.encoder.seen is not None:
        (folder / PRETRAINED_ON).write_bytes(request.encoder.seen.public())
