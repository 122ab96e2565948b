"""TorchScript files of fixed networks, without the source paths that torch leaves in them.

MONAI's runners move a network to a device and put it into evaluation mode, which the programs of torch.export refuse
(torch 2.14); so its bundles keep `model.ts`, and so do we, although torch calls the format deprecated.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

LEFT_OUT = ("version", ".data/version", "byteorder", ".data/serialization_id", "archive_name")
"""Records that torch's writer adds by itself."""


def write_script(module: nn.Module, example: Tensor, path: Path) -> None:
    """Trace `module` with `example` and write it; the size of the batch stays open.

    The file holds weights and code, and neither file names nor line numbers of the Python that it was made from.

    Args:
        module: takes one tensor, decides nothing by its values (see `exporters.fixed`), in evaluation mode.
        example: an input.
        path: of the file, usually model.ts.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # torch wants torch.export, whose programs MONAI cannot run; sizes are constants here, and meant to be.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(module, (example,), check_trace=False)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            torch.jit.save(traced, str(whole))
            _without_sources(whole, path)


def _without_sources(whole: Path, path: Path) -> None:
    """Copy a TorchScript archive, less its table of source files."""
    reader, writer = torch._C.PyTorchFileReader(str(whole)), torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and not name.startswith("traced_inputs") and name not in LEFT_OUT:
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
