# SPDX-License-Identifier: MIT
"""What several tests use, and the line 'N passed, M failed' that tests/run_all.py reads."""
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build" / "deps"))


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def pytest_terminal_summary(terminalreporter):
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error")}
    terminalreporter.write_line(f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed")
