"""Run tests of GPU kernels under one build and schedule of the SIMT executor: ``python tests/simt --help``.

Example: ``python tests/simt --build thread tests/test_batch_norm_act_simt.py -k bits -x``
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import simt


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/simt", description="Run GPU kernels on the CPU, checked.")
    parser.add_argument("--build", choices=simt.SANITIZERS, default="none", help="address brings UBSan with it")
    parser.add_argument("--schedule", choices=simt.SCHEDULES, default="in_order", help="order of blocks and threads")
    parser.add_argument("--seed", type=int, default=0, help="of the random schedule")
    options, rest = parser.parse_known_args()
    if reason := simt.missing():
        sys.exit(reason)
    simt.build("_simt", options.build)
    environment = dict(os.environ) if options.build == "none" else simt.sanitized_environment(options.build)
    environment["DEEPOPS_SIMT_SCHEDULE"] = f"{options.schedule}:{options.seed}"
    # -s: a sanitizer ends the process, and with it what pytest has captured
    os.chdir(simt.ROOT)
    os.execve(sys.executable, [sys.executable, "-m", "pytest", "-s", *(rest or ["-k", "simt"])], environment)


if __name__ == "__main__":
    main()
