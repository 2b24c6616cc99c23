"""Contract: many devices give the run of one. Each file has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "eight_devices").glob("test_*.py"))
FLAG = "--xla_force_host_platform_device_count=8"


def test_there_are_files():
    assert len(FILES) >= 5


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", "0"),
            *("-p", "no:cacheprovider", str(HERE / "eight_devices" / file)),
        ],
        cwd=HERE.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-20000:]
