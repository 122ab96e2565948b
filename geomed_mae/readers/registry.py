"""Which readers there are, and one of them by its name."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from geomed_mae.errors import MissingExtraError
from geomed_mae.plugins import load_plugin, plugin_names
from geomed_mae.readers.wire import trust

MARKER = "SUFFIXES"


@cache
def readers() -> dict[str, ModuleType]:
    """Return every reader module by its name; none of their packages is imported."""
    found = {name: load_plugin("readers", name, marker=MARKER) for name in plugin_names("readers", marker=MARKER)}
    for module in found.values():
        trust(module.__name__)
    return found


def load_readers() -> None:
    """Import every reader module, none of their packages: headers from another process can then be unpacked."""
    readers()


def reader(name: str) -> ModuleType:
    """Return the reader module `name`, its package checked to be installed.

    Raises:
        MissingExtraError: the package that reads this format is not installed.
    """
    # From the cache: looking through entry points takes 15 ms, and this runs once a file.
    module = readers().get(name) or load_plugin("readers", name, marker=MARKER)
    try:
        importlib.import_module(module.PACKAGE)
    except ImportError:
        raise MissingExtraError(f"reading {name}", module.PACKAGE, module.EXTRA) from None
    return module
