"""The command line: a table of contents. Each command parses its options and calls the verb of the same name.

    archive    doctor, scan, inspect, demo
    training   pretrain, finetune, evaluate, probe, reconstruct, report
    outputs    predict, embed, export
    options    options that several commands share
    group      the group: errors, exit codes, progress, results

Human text and progress go to stderr; the result (a path or a JSON object) goes to stdout. Exit codes: 0 ok, 1 bug,
2 usage or config, 3 too many bad inputs, 4 output I/O, 5 integrity, 6 leakage, 7 security refusal, 8 numerical failure,
75 preempted (saved, requeue). Verbs are imported inside their command, so that `--help` loads neither torch nor
readers.
"""

from __future__ import annotations

from geomed_mae.cli import archive, outputs, training
from geomed_mae.cli.group import main

__all__ = ["main"]

# In the order of the work, not of the alphabet: `--help` lists them so.
for command in (
    archive.doctor,
    archive.scan,
    archive.inspect,
    training.pretrain,
    training.finetune,
    training.evaluate,
    training.probe,
    outputs.predict,
    outputs.embed,
    training.reconstruct,
    outputs.export,
    training.report,
    archive.demo,
):
    main.add_command(command)
