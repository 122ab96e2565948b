"""Every error that geomed_mae raises on purpose, and the exit code that the command line turns it into.

    GeomedError                     1   a bug if it reaches the user as such
    ├── ConfigError (ValueError)    2   recipe, option or argument; also a command that cannot do something yet
    │   └── MissingExtraError (ImportError)  2   an optional package is not installed
    ├── ReadError (ValueError)      3   one file cannot become an Image; carries a typed reason
    ├── TooManyBadInputsError       3   an archive is beyond its error budget, or holds nothing usable
    ├── OutputError (OSError)       4   disk full, permission, lock
    ├── IntegrityError              5   checkpoint, cache, encoder or manifest does not verify
    ├── LeakageError                6   a score would be computed over data that was trained on
    ├── SecurityError               7   refused for safety (pickle, path outside the root, URL in data)
    ├── NumericalError (ArithmeticError)  8   the NaN policy is exhausted
    └── Preempted                   75  told to stop; the state is saved, requeue

A message says what was found, where, and what to do about it, in one sentence or two.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class GeomedError(Exception):
    """Root of the tree; `exit_code` is what the command line exits with."""

    exit_code = 1


class ConfigError(GeomedError, ValueError):
    """A recipe, an option or an argument is wrong, or asks for what a command cannot do."""

    exit_code = 2


class MissingExtraError(ConfigError, ImportError):
    """A package that only some users need is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package '{package}', which is not installed: pip install 'geomed-mae[{extra}]'"
        )


class ReadError(GeomedError, ValueError):
    """One file, or one image made of several files, cannot become an Image.

    `reason` is a code of `geomed_mae.readers.reasons.Reason`, so that a ledger can count it.
    """

    exit_code = 3

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Exceptions with extra arguments do not cross process borders without this.
        return type(self), (self.args[0], self.reason)


class TooManyBadInputsError(GeomedError):
    """More of an archive is unusable than the error budget allows, or all of it is."""

    exit_code = 3


class OutputError(GeomedError, OSError):
    """An output cannot be written."""

    exit_code = 4


class IntegrityError(GeomedError):
    """Stored bits are not the bits that were written."""

    exit_code = 5


class LeakageError(GeomedError):
    """A score was asked for over data that training has seen.

    `kinds` counts the images by what they have in common with others, `count` counts them all, `keys` has some keys.
    """

    exit_code = 6

    def __init__(
        self, message: str, *, kinds: Mapping[str, int] | None = None, count: int = 0, keys: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.kinds, self.count, self.keys = dict(kinds or {}), count, keys


class SecurityError(GeomedError):
    """Something was refused because following it would not be safe."""

    exit_code = 7


class NumericalError(GeomedError, ArithmeticError):
    """Loss or gradients stayed NaN or infinite for longer than the policy allows."""

    exit_code = 8


class Preempted(GeomedError):
    """The process was told to stop; everything is saved and the run can be resumed."""

    exit_code = 75


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known name is nearest to `name`, or list them: the tail of an error message."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known) or 'none'}"
