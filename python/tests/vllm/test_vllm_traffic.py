# SPDX-License-Identifier: MIT
"""
Random traffic: requests of random lengths that share prefixes, come and go, are aborted and preempted, with n = 4. Each greedy
answer is the one that the request gets by itself, in an engine that shares nothing.
"""
import os

EIGHT = {"formats": "sq8/sq8", "n_recent": 64}
N_REQUESTS = int(os.environ.get("TQ_TEST_REQUESTS", "300"))


def test_traffic(engine, toy):
    steps = [{"kind": "traffic", "seed": 5, "requests": N_REQUESTS}, {"kind": "metrics"}]
    found, counts = engine(toy("llama"), EIGHT, steps, num_gpu_blocks_override=40, max_num_batched_tokens=128,
                           max_model_len=512)
    assert counts["vllm:num_preemptions"] > 0
    assert counts["vllm:prefix_cache_hits"] > 0
    served = [request for request in found if request["answers"] is not None]
    assert 0.7 * N_REQUESTS < len(served) < N_REQUESTS, "some are aborted"
    assert any(len(request["answers"]) == 4 for request in served)
    one_by_one = {"kind": "generate", "prompts": [request["prompt"] for request in served], "n": 40, "one_by_one": True}
    single = engine(toy("llama"), EIGHT, [one_by_one], enable_prefix_caching=False)[0]
    wrong = [i for i, (request, result) in enumerate(zip(served, single))
             if any(answer != result["tokens"][: request["n_tokens"]] for answer in request["answers"])]
    assert not wrong, f"{len(wrong)} of {len(served)} requests got another answer than by themselves"
