"""The verb report: a run or study folder -> report.html, one file without script or network."""

from __future__ import annotations

from pathlib import Path

from geomed_mae.reporting.pages import write_report


def report(run: str | Path) -> Path:
    """Write RUN/report.html from what the run, or the study, has recorded so far, finished or not; return its path.

    Raises:
        ConfigError: the folder is neither run nor study, or has nothing to report yet.
        IntegrityError, OutputError: records are damaged; the page cannot be written.
    """
    return write_report(run)
