"""Another program: a fresh interpreter in which this package cannot be imported, to open what it has written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

BLOCKED = "import sys\nsys.modules['geomed_mae'] = None  # an import of it is an ImportError from here on\n"
OFFLINE = {"HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}


def elsewhere(code: str, *args: str | Path, timeout_s: int = 300) -> Any:
    """Run `code` with `args` as sys.argv[1:]; return the JSON value that it prints in its last line.

    Raises:
        AssertionError: it failed; the message is what it said on stderr.
    """
    # Our readers switch GDAL drivers off by the environment, which another program would not have from us.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GDAL_")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + dedent(code), *map(str, args)],
        cwd="/",
        env={**own, **OFFLINE},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
