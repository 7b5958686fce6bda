# SPDX-License-Identifier: MIT
"""libturboquant.transformers.fold: models with outlier keys compute the same without them; others stay as they were."""
import numpy as np
import pytest
import torch
import libturboquant
from test_transformers_factors import KINDS, kl, make, make_with_outliers
from tiny import divergence, ids, logits, make_model, make_shared_model, stock, use_attention_of
from transformers import AutoModelForCausalLM
from libturboquant import UnsupportedError
from libturboquant.transformers import fold

FOLDED = [kind for kind in KINDS if kind != "gpt_neox"]


def folded(model):
    use_attention_of(model, None)
    return fold(model)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", FOLDED)
def test_outliers(kind):
    """Logits stay what they are, and a cache without factors of its own does as well as with them."""
    model, input_ids = make_with_outliers(kind), ids(1, 200)
    wanted = logits(model, stock(model), input_ids)
    without = kl(model, input_ids, wanted, factors="off")
    found = folded(model)
    assert len(found) == 4 and min(found.values()) >= 4
    assert abs(divergence(wanted, logits(model, stock(model), input_ids))) < 1e-6
    assert kl(model, input_ids, wanted, factors="off") < .3 * without
    assert max(folded(model).values(), default=1) <= 2  # what rounding leaves


def test_what_was_found_before_is_forgotten():
    """Factors that a cache found would be too much for folded keys."""
    model, input_ids = make_with_outliers("llama"), ids(1, 200)
    wanted = logits(model, stock(model), input_ids)
    before = kl(model, input_ids, wanted)
    folded(model)
    assert kl(model, input_ids, wanted) < 2 * before


def test_saved(tmp_path):
    model, input_ids = make_with_outliers("qwen2"), ids(1, 100)
    wanted = logits(model, stock(model), input_ids)
    fold(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to(model.device).eval()
    assert torch.equal(logits(again, stock(again), input_ids), wanted)


def test_what_is_not_understood_stays_as_it_was():
    for model, words in ((make_with_outliers("gpt_neox"), "in one projection"), (make_shared_model("gemma3n"), "another layer"),
                         (make_model("gpt2"), "no projections")):
        before = weights(model)
        with pytest.raises(UnsupportedError, match=words):
            fold(model)
        assert_same_weights(model, before)


def test_channels_that_do_not_turn_together(monkeypatch):
    """Logits tell, and the weights are put back."""
    model = make_with_outliers("llama")
    before = weights(model)
    monkeypatch.setattr(libturboquant._torch_fold, "rope", lambda module, n: (np.arange(n, dtype=np.int32) ^ 1, None))
    with pytest.raises(UnsupportedError, match="logits of LlamaForCausalLM moved by .*what they were"):
        fold(model)
    assert_same_weights(model, before)


def test_a_model_that_needs_nothing():
    model = make("llama")
    before = weights(model)
    assert fold(model) == {}
    assert_same_weights(model, before)
