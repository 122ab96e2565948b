"""The folder is the registry: a plug-in is a module or package in it, or an entry point of another distribution.

A name is looked up, never an import path: nothing found in data can decide what is imported.
Entry points live in the group `geomed_mae.<folder>` (for example `geomed_mae.readers`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from pathlib import Path
from types import ModuleType

from geomed_mae.errors import ConfigError, suggest

PACKAGE = "geomed_mae"


def plugin_names(folder: str, *, marker: str) -> list[str]:
    """Return the sorted names of the plug-ins of `folder`, our own and those of entry points.

    `marker` is a name that a plug-in's source defines at top level (`SUFFIXES`, `export` ...). It is looked for in the
    text, so that listing plug-ins imports none of their dependencies.
    """
    package = importlib.import_module(f"{PACKAGE}.{folder}")
    own = [
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if any(
            line.startswith((f"{marker} ", f"{marker}:", f"def {marker}(", f"class {marker}(", f"class {marker}:"))
            for line in _source(Path(package.__path__[0]), info).read_text(encoding="utf-8").splitlines()
        )
    ]
    foreign = [point.name for point in importlib.metadata.entry_points(group=f"{PACKAGE}.{folder}")]
    return sorted({*own, *foreign})


def _source(folder: Path, info: pkgutil.ModuleInfo) -> Path:
    return folder / info.name / "__init__.py" if info.ispkg else folder / f"{info.name}.py"


def load_plugin(folder: str, name: str, *, marker: str) -> ModuleType:
    """Import plug-in `name` of `folder`.

    Raises:
        ConfigError: there is no such plug-in; the message names the nearest one.
    """
    names = plugin_names(folder, marker=marker)
    module_name = name.replace("-", "_")
    if name not in names and module_name not in names:
        raise ConfigError(f"'{name}' is not one of the {folder}: {suggest(name, [n.replace('_', '-') for n in names])}")
    for point in importlib.metadata.entry_points(group=f"{PACKAGE}.{folder}"):
        if point.name in (name, module_name):
            return point.load()
    return importlib.import_module(f"{PACKAGE}.{folder}.{module_name}")
