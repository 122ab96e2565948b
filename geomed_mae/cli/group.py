"""The group of all commands: how errors become exit codes, how a command is made, how it shows progress and results."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click

from geomed_mae.errors import GeomedError, OutputError, TooManyBadInputsError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it (128 + SIGINT)."""


class Commands(click.Group):
    """The group: turns errors into one sentence on stderr and the exit code of their class."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the work, not of the alphabet."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and exit with the code that the error tree gives."""
        try:
            with _ending_tidily():
                return super().main(*args, **kwargs)
        except GeomedError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            click.echo(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True)
            sys.exit(OutputError.exit_code)
        except Exception:
            traceback.print_exc()
            click.echo("error: this is a bug in geomed-mae; please report it with the lines above", err=True)
            sys.exit(GeomedError.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click itself would take Ctrl-C for exit code 1, which means a bug."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@contextlib.contextmanager
def _ending_tidily() -> Iterator[None]:
    """Let SIGTERM end the command as an exception does, so that half-written folders are removed.

    Commands that save their state at the signal put their own handler in its place. One of several processes is left
    as it is: the others would be waited for.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Command(click.Command):
    """A command whose `--archive` takes several values after one flag, as shell patterns give them."""

    MANY = "--archive"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, as click wants it."""
        repeated: list[str] = []
        inside = False
        for before, arg in zip(["", *args], args, strict=False):
            if arg.startswith("-"):
                inside = arg == self.MANY
            elif inside and before != self.MANY:
                repeated.append(self.MANY)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


def command(example: str) -> Callable[[Callable], click.Command]:
    """Make a command of a function; its help is the docstring and ends with a working example."""

    def make(function: Callable) -> click.Command:
        function.__doc__ = f"{cleandoc(function.__doc__ or '')}\n\nExample:\n\n\b\n    {example}"
        return click.command(cls=Command)(function)

    return make


def progress(items: Iterable, what: str, total: int) -> Iterable:
    """Return the items, with a bar on stderr while they are taken."""
    from tqdm import tqdm  # loads a tenth of a second of machinery

    # A log file gets a line now and then, not a picture drawn over itself.
    every = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, total=total, file=sys.stderr, mininterval=every, leave=False, disable=total < 2)


def show(result: Any) -> None:
    """Write a command's result to stdout: a path as it is, anything else as JSON.

    Where the result names inputs under `failed`, exit with the code for bad inputs afterwards: the others are done.
    """
    click.echo(str(result) if isinstance(result, Path) else json.dumps(result, indent=2))
    if isinstance(result, dict) and (failed := result.get("failed")):
        click.echo(f"error: {len(failed)} inputs could not be read; see `failed` in the result", err=True)
        sys.exit(TooManyBadInputsError.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="geomed-mae")
@click.option("-v", "--verbose", count=True, help="More log lines on stderr.")
def main(verbose: int) -> None:
    """Turn an unlabelled archive of raw satellite or medical images into a pretrained encoder, and use it.

    Start with: geomed-mae demo
    """
    level = logging.WARNING - 10 * min(verbose, 2)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(message)s")
    for other in ("matplotlib", "PIL"):  # their debugging is about fonts, and names folders
        logging.getLogger(other).setLevel(logging.WARNING)
