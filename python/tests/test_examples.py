# SPDX-License-Identifier: MIT
"""The examples in Python run, and say what they should. mlx_generate.py needs a converted model: test_mlx_real_model.py."""
import subprocess
import sys

from conftest import DEPS, ROOT
from smollm import FILE


def run(folder, name, *arguments):
    done = subprocess.run([sys.executable, ROOT / "examples" / name, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cache(tmp_path):
    text = run(tmp_path, "cache.py")
    assert "1001 tokens" in text and "refused: k: has shape" in text


def test_tutorial(tmp_path):
    text = run(tmp_path, "tutorial.py")
    assert all(f"{preset}: " in text for preset in ("TQ6", "TQ4", "TQ3", "TQ2")) and "Loaded: 1024 tokens." in text
    assert (tmp_path / "tutorial.svg").read_text().count("TQ") >= 4


def test_transformers_generate(tmp_path):
    text = run(tmp_path, "transformers_generate.py", DEPS / "models" / FILE, "The capital of France is", "--n-tok", "12")
    assert "Paris" in text and "30 layers compressed" in text
