"""What other processes do for test_predict_resume and test_predict_ranks, with blocks of a few windows.

python -m tests.predicting killed RUN ARCHIVE OUT    in turn: killed in a block, killed while the image is put
                                                     together, without room on the disk, and to the end
python -m tests.predicting ranks RUN ARCHIVE OUT     the command itself, as a launcher starts it
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

from geomed_mae.cli import main as command
from geomed_mae.errors import OutputError
from geomed_mae.outputs import rounds
from geomed_mae.predict import predict

MEMORY = 16384
"""Bytes for the sums of a block, instead of many millions."""


def small_blocks() -> None:
    """Make blocks as small as they get."""
    rounds.block_size = functools.partial(rounds.block_size, memory=MEMORY)


def apart(action) -> int:
    """Run something in a forked process; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(OutputError):
            action()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    """End this process as the kernel ends one when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_after(count: int):
    """Return a `write_block` that kills its process in the middle of a later block."""
    left, whole = [count], rounds.write_block

    def write(path: Path, *args, **how) -> None:
        if not left[0]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".1.partial").write_bytes(b"half a block")
            die()
        left[0] -= 1
        whole(path, *args, **how)

    return write


def dying_while_put_together(*args, **how):
    """Stand for `put_together`: one strip, then the end."""
    yield next(iter(PUT_TOGETHER(*args, **how)))
    die()


PUT_TOGETHER = rounds.put_together


def without_room(run: str, archive: str, out: str) -> None:
    """Predict where no file may grow beyond a few bytes: what a full disk is to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    predict(run, [archive], out)


def killed(run: str, archive: str, out: str) -> None:
    """Interrupt `predict` in three ways, then let it finish; print what became of each."""
    small_blocks()
    seen, whole = {}, rounds.write_block
    for number, count in enumerate(random.Random(os.environ.get("SEED", "0")).sample(range(1, 4), 2)):
        rounds.write_block = dying_after(count)
        seen[f"killed {number}"] = [apart(lambda: predict(run, [archive], out)), files(out)]
    rounds.write_block = whole
    seen["no room"] = [apart(lambda: without_room(run, archive, out)), files(out)]
    rounds.put_together = dying_while_put_together
    seen["put together"] = [apart(lambda: predict(run, [archive], out)), files(out)]
    rounds.put_together = PUT_TOGETHER
    seen["result"] = predict(run, [archive], out)
    sys.stdout.write(json.dumps(seen) + "\n")


def files(out: str) -> list[str]:
    """Return the names of the files that are there under their final names."""
    return sorted(path.name for path in Path(out).iterdir() if path.is_file())


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(*sys.argv[2:])
    else:
        small_blocks()
        run, archive, out = sys.argv[2:]
        command(["predict", run, "--archive", archive, "--out", out, "--batch", "3"])
