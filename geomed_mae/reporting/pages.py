"""Which page a folder gets: that of a run, or that of a study."""

from __future__ import annotations

from pathlib import Path

from geomed_mae.reporting.page import write_page
from geomed_mae.reporting.section import run_section
from geomed_mae.reporting.study import study_section
from geomed_mae.training.study_files import is_study

REPORT = "report.html"
NAMES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}


def write_report(folder: str | Path) -> Path:
    """Write FOLDER/report.html from what a run or a study has recorded so far, finished or not, and return its path.

    Raises:
        ConfigError: the folder is neither, or has nothing to report yet.
        IntegrityError, OutputError: records are damaged; the page cannot be written.
    """
    folder = Path(folder)
    if is_study(folder):
        section = study_section(folder)
        return write_page(folder / REPORT, "Fine-tuning study", section.lead, [section])
    section = run_section(folder, "Run")
    verb = section.lead.split(",")[0]
    return write_page(folder / REPORT, f"{NAMES.get(verb, verb)} report", section.lead, [section])
