"""Options that several commands share, and the types of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

EXISTING = click.Path(exists=True, path_type=Path)
ANY_PATH = click.Path(path_type=Path)

archive_option = click.option(
    "--archive", "archives", type=EXISTING, multiple=True, required=True, help="Raw files and folders, or an INDEX."
)
labels_option = click.option("--labels", type=EXISTING, required=True, help="Label files: a file or a folder.")
modality_option = click.option(
    "--modality", multiple=True, default=("auto",), show_default=True, help="Modality names or YAML files, or auto."
)
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
resume_option = click.option("--resume", is_flag=True, help="Continue the run in --out.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
transductive_option = click.option(
    "--transductive", is_flag=True, help="Allow, and record, that the encoder has seen test images without labels."
)


class Fraction(click.ParamType):
    """A share, written 1% or 0.01."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number from 0 to 1."""
        try:
            text = str(value)
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"'{value}' is not a share such as 1% or 0.01", param, ctx)
        return share


class Pixel(click.ParamType):
    """A pixel of an image, written ROW,COLUMN."""

    name = "row,column"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the pixel as two numbers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
            self.fail(f"'{value}' is no pixel such as 1200,800", param, ctx)
        return int(parts[0]), int(parts[1])


split_option = click.option("--split", metavar="PART", help="Use this part of an INDEX's stored split alone.")
channels_option = click.option("--channels", metavar="LIST", help="Channels to use: B08,B12; default: all.")
