# SPDX-License-Identifier: MIT
"""The arithmetic of bench/engines.py, of which no engine is needed."""
import argparse
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import engines  # noqa: E402


def test_divergences():
    """By hand, for (1/2, 1/2) and (1/4, 3/4), whatever constant logits have; and nothing for the same."""
    wanted = np.array([[0, 0], [7, 7], [0, np.log(3)]], np.float32)
    found = np.array([[0, np.log(3)], [-50, np.log(3) - 50], [100, np.log(3) + 100]], np.float32)
    by_hand = .5 * np.log(2) + .5 * np.log(2 / 3)
    assert np.allclose(engines.divergences(wanted, found, rows=2), [by_hand, by_hand, 0], atol=1e-6)


def test_divergence_has_a_direction():
    one, other = np.log([[.5, .5]]), np.log([[.01, .99]])
    assert engines.divergences(one, other) == pytest.approx(.5 * np.log(.5 / .01) + .5 * np.log(.5 / .99))
    assert engines.divergences(other, one) == pytest.approx(.01 * np.log(.01 / .5) + .99 * np.log(.99 / .5))


def test_figures():
    kl = np.arange(1001) / 1000
    found = engines.figures_of(kl, kl < .25)
    assert found["kld_mean"] == pytest.approx(.5) and found["kld_99_9"] == pytest.approx(.999)
    assert found["kld_mean_error"] == pytest.approx(np.sqrt((1001 ** 2 - 1) / 12 / 1000) / 1000)  # 0 to 1000, in thousandths
    assert found["same_top_1"] == pytest.approx(100 * 250 / 1001)


@pytest.mark.parametrize("n_ctx, step", [(16, 4), (16, 16), (12, 5), (10, 8)])
def test_scored_tokens(n_ctx, step):
    """llama-perplexity's: those after the first half, but for the last."""
    class Counting(engines.InPython):
        def __init__(self):
            self.args = argparse.Namespace(context=n_ctx)

        def begin(self, name):
            return lambda part, n_last: np.stack([part, part], axis=1)[len(part) - n_last :]

        def step(self, name):
            return step

    n_read = []
    logits = Counting().read(np.arange(n_ctx), "TQ4", n_read.append)
    assert logits[:, 0].tolist() == list(range(n_ctx // 2, n_ctx - 1)) and sum(n_read) == n_ctx


@pytest.mark.parametrize("figure, other, floor, same", [
    (.0114, .0100, .001, True), (.0116, .0100, .001, False), (.0086, .0100, .001, True), (.0084, .0100, .001, False),
    (.0059, .0050, .001, True), (.0061, .0050, .001, False), (.0001, .0010, .001, True),
])
def test_rule(figure, other, floor, same):
    """15 % beyond five floors, a floor below."""
    assert engines.agrees(figure, other, floor) is same


def rows(**figures):
    fixed = {"kld_mean_error": ".0001", "kld_99_9": "1"}
    return [{"engine": engine, "name": name, "tokens": tokens, "kld_mean": str(mean), **fixed}
            for engine, (tokens, *means) in figures.items() for name, mean in zip(["floor", "TQ3", "TQ2"], means)]


def test_report():
    lines = engines.report(rows(**{"llama.cpp": ("a", .001, .01, .02), "mlx-lm": ("a", 1e-9, .012, .021)}), ["TQ3", "TQ2"])
    assert lines[2].startswith("| llama.cpp | .0010 ± .0001, 1.0000 | .0100 ")
    assert lines[4:] == ["TQ3: mlx-lm has .0120, llama.cpp .0100, its floor .0010: +20 %"]


def test_report_of_different_tokens():
    lines = engines.report(rows(**{"llama.cpp": ("a", .001, .01), "mlx-lm": ("b", 1e-9, .012)}), ["TQ3"])
    assert "different tokens" in lines[-1] and not any(line.startswith("TQ3") for line in lines)
