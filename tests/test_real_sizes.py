"""Contract: no call of ordinary size ends the process.

A fault of version 0.1.0 did, at 12,484 rows and more, where no test had rows.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parent / "processes" / "real_sizes.py"


@pytest.mark.parametrize("size", [(100_000, 20), (1_000_000, 4)], ids=str)
def test_every_driver_with_its_defaults(size):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *map(str, size)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.endswith("all\n")
