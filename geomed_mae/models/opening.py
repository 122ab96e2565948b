"""From a path to the one image that is meant, read as one of the modalities that a model knows."""

from __future__ import annotations

import os
from pathlib import Path

from geomed_mae.errors import ConfigError
from geomed_mae.image import Image
from geomed_mae.models.contract import Contract


def image_of(given: Image | str | os.PathLike[str], contract: Contract) -> Image:
    """Return an Image as it is; read a path, a file or a folder such as a DICOM series, as what the contract knows.

    Raises:
        ConfigError: there is nothing at the path, or more than one image, or the contract's modalities come from files
            of the user's, so that the path does not say what its pixels mean.
        ReadError, TooManyBadInputsError: nothing there can be read as one of the modalities; the message says why.
    """
    if isinstance(given, Image):
        return given
    # Late: a model in use on a GPU machine needs no reader.
    from geomed_mae.modalities import modality_names
    from geomed_mae.readers import read_image

    wanted = sorted({entry.modality for entry in contract.channels})
    known = [name for name in wanted if name in modality_names() or Path(name).is_file()]
    if not known:
        raise ConfigError(
            f"'{given}' cannot be read by its path alone, because the modality {', '.join(wanted)} of the model comes "
            "from a file of yours; read it with gm.read_images(PATH, modality='that_file.yaml') and give the image"
        )
    return read_image(given, known)
