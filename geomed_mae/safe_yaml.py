"""YAML 1.2 from files that we did not write: no tags, no aliases, no surprise types, a size limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError

MAX_YAML_BYTES = 1 << 20
"""A recipe or modality file larger than this is not one."""


def read_yaml(path: Path) -> Any:
    """Read a YAML 1.2 file with the safe loader: `1e-4` is a number, `no` is a string, no tag is followed.

    Raises:
        ConfigError: missing, too large, with anchors (which can expand without bound), or not YAML.
    """
    from ruamel.yaml import YAML  # heavy enough to matter for --help
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise ConfigError(f"there is no file '{path}'")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a recipe or modality has at most {MAX_YAML_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        parser = YAML(typ="safe", pure=True)
        if any(type(event).__name__ == "AliasEvent" for event in YAML(typ="safe", pure=True).parse(text)):
            raise ConfigError(f"{path.name} uses YAML aliases (*name); write the value out")
        return parser.load(text)
    except (YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path.name} is not valid YAML: {detail[:300]}") from error
