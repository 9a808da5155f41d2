"""The GPU kernels under AddressSanitizer with UBSan, and under ThreadSanitizer with each fiber as a thread."""

from __future__ import annotations

import subprocess
import sys

import pytest

import simt

pytestmark = pytest.mark.skipif(bool(simt.missing()), reason=simt.missing())


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_small_cases_are_clean(sanitizer: str) -> None:
    simt.build("_simt", sanitizer)
    environment = simt.sanitized_environment(sanitizer)
    command = [sys.executable, str(simt.HERE / "small_cases.py")]
    done = subprocess.run(command, env=environment, cwd=simt.ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.endswith("clean\n")
