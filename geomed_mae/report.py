"""The verb report: a run folder -> report.html, one self-contained file (pictures inside, no script, no network)."""

from __future__ import annotations

from pathlib import Path

from geomed_mae.reporting.page import write_page
from geomed_mae.reporting.section import run_section

NAMES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}


def report(run: str | Path) -> Path:
    """Write RUN/report.html from what the run has recorded so far, finished or not, and return its path.

    Raises:
        ConfigError: the folder is no run, or has nothing to report yet.
        IntegrityError, OutputError: records are damaged; the page cannot be written.
    """
    run = Path(run)
    section = run_section(run, "Run")
    verb = section.lead.split(",")[0]
    return write_page(run / "report.html", f"{NAMES.get(verb, verb)} report", section.lead, [section])
