"""Recipe files: YAML to a checked `config.Recipe` and back.

`extends: other.yaml` starts from another recipe (relative to the file); `--set train.steps=50` overrides. An unknown
key is an error that names the nearest known one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError, suggest
from geomed_mae.safe_yaml import read_yaml

MAX_EXTENDS = 8
"""Longer chains of `extends` are taken for a loop."""


def recipes_folder() -> Path:
    """Return the folder of recipes: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    return next((path for path in (package.parent / "recipes", package / "recipes") if path.is_dir()), package)


def _find(path: Path) -> Path:
    """Return `path`, or the packaged recipe of that name ("pretrain_ct_tiny")."""
    if path.is_file():
        return path
    packaged = recipes_folder() / (path.name if path.suffix else f"{path.name}.yaml")
    if packaged.is_file() and len(path.parts) == 1:
        return packaged
    known = [entry.stem for entry in recipes_folder().glob("*.yaml")]
    raise ConfigError(f"there is no recipe '{path}'; {suggest(path.stem, known)}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in ("values", "weights")
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read(path: Path, depth: int = 0) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} is not a recipe: it holds no mapping of sections")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if depth >= MAX_EXTENDS:
        raise ConfigError(f"{path.name}: more than {MAX_EXTENDS} recipes extend one another; is there a loop?")
    return _merge(_read(path.parent / str(parent), depth + 1), data)


def _override(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one `--set section.key=value`; the value is read as YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set takes section.key=value, for example train.steps=50, not '{assignment}'")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"--set {key}: '{text}' is not a value: {' '.join(str(error).split())[:200]}") from error
    for part in reversed(parts):
        value = {part: value}
    return _merge(data, value)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Return the field names of the section that holds the last part of `location`."""
    model: Any = Recipe
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{key}'; {suggest(str(location[-1]), _known_keys(location))}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if not location or isinstance(first["input"], dict) else f" (found {first['input']!r})"
    return f"{origin}: {key + ': ' if key else ''}{message}{found}"


def build_recipe(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check plain values as a recipe; `origin` is the name that error messages carry.

    Raises:
        ConfigError: with the key, what was found and what is allowed.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe file (or the packaged recipe of that name), apply overrides, and check it.

    Raises:
        ConfigError: with the file, the key, what was found and what is allowed.
    """
    found = _find(Path(os.fspath(path)))
    data = _read(found)
    for assignment in overrides:
        data = _override(data, assignment)
    return build_recipe(data, found.name)


def recipe_of(overrides: Sequence[str]) -> Recipe:
    """Return the defaults with overrides, for commands without a recipe file.

    Raises:
        ConfigError: with the key, what was found and what is allowed.
    """
    data: dict[str, Any] = {}
    for assignment in overrides:
        data = _override(data, assignment)
    return build_recipe(data, "--set")


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal value."""
    return dump_yaml(recipe.model_dump(mode="json", exclude_none=True))


def dump_yaml(data: dict[str, Any]) -> str:
    """Return plain values as YAML."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()
