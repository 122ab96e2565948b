"""`python -m geomed_mae`, the same as the command geomed-mae (and what torchrun and srun start)."""

import logging
import os
import sys
from typing import NoReturn

from geomed_mae.cli import main


def leave(code: int) -> NoReturn:
    """End this process, one of several, with `code`, and without the interpreter's own end.

    Behind DDP torch (2.14) leaves threads of gloo running after the process group is destroyed. What then takes the
    process apart meets them, and now and then ends a finished run with SIGABRT, "terminate called without an active
    exception". Runs, loaders and logs are closed by the time that a command returns.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":
        main()
    else:
        try:
            main()
        except SystemExit as end:
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
