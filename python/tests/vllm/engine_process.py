# SPDX-License-Identifier: MIT
"""
One vLLM engine in a process of its own, since an engine leaves things behind: engine_process.py JOB RESULT. JOB is JSON with
the arguments of vllm.LLM and steps, RESULT the list of what the steps gave.
"""
import json
import os
import random
import sys

os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "passive"})
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def prompts_of(rows):
    return [{"prompt_token_ids": row} for row in rows]


def generate(llm, step):
    """Tokens of each prompt, those from the prefix cache, and log-probabilities of the prompt where they are asked for."""
    from vllm import SamplingParams

    if step.get("reset"):
        assert llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=step["n"],
                              prompt_logprobs=0 if step.get("logprobs") else None)
    found = []
    batches = [[row] for row in step["prompts"]] if step.get("one_by_one") else [step["prompts"]]
    for batch in batches:
        for out in llm.generate(prompts_of(batch), sampling, use_tqdm=False):
            ids = out.prompt_token_ids
            logprobs = [place[token].logprob for place, token in zip((out.prompt_logprobs or [])[1:], ids[1:])]
            found.append({"tokens": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens, "logprobs": logprobs})
    return found


def metrics(llm, _step):
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


def requests_of(step, vocabulary):
    """Random requests, many of which begin as others do."""
    draw = random.Random(step["seed"])
    prefixes = [[draw.randrange(3, vocabulary) for _ in range(draw.choice((32, 96, 160)))] for _ in range(6)]
    for _ in range(step["requests"]):
        begin = draw.choice(prefixes) if draw.random() < 0.6 else []
        rest = [draw.randrange(3, vocabulary) for _ in range(draw.randrange(1, 90))]
        yield {"prompt": begin + rest, "n_tokens": draw.randrange(1, 40), "n": 4 if draw.random() < 0.1 else 1,
               "aborted_after": draw.randrange(12) if draw.random() < 0.1 else None}


def traffic(llm, step):
    """
    Requests that come while others are served, and some of which are aborted: of each the prompt and its answers, None for one
    that was aborted.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    draw, engine = random.Random(step["seed"] + 1), llm.llm_engine
    waiting = list(requests_of(step, llm.model_config.get_vocab_size()))
    answers, alive, n_steps = {}, {}, 0
    for i, request in enumerate(waiting):
        request["id"] = str(i)
    coming = list(waiting)
    while coming or alive:
        for _ in range(draw.randrange(4)):
            if coming and len(alive) < 16:
                request = coming.pop(0)
                # Greedy sampling takes no n; the best of one is the same.
                choice = {"temperature": 0} if request["n"] == 1 else {"temperature": 1, "top_k": 1, "n": request["n"]}
                sampling = SamplingParams(ignore_eos=True, max_tokens=request["n_tokens"],
                                          output_kind=RequestOutputKind.FINAL_ONLY, **choice)
                engine.add_request(request["id"], {"prompt_token_ids": request["prompt"]}, sampling)
                alive[request["id"]] = n_steps
        for out in engine.step():
            if out.finished and out.request_id in alive:
                del alive[out.request_id]
                answers[out.request_id] = [list(o.token_ids) for o in out.outputs]
        n_steps += 1
        for name, since in list(alive.items()):
            after = waiting[int(name)]["aborted_after"]
            if after is not None and n_steps - since > after:
                engine.abort_request([name])
                del alive[name]
    return [{"prompt": request["prompt"], "n_tokens": request["n_tokens"], "answers": answers.get(request["id"])}
            for request in waiting]


def main():
    job = json.loads(open(sys.argv[1]).read())
    from vllm import LLM

    kinds = {"generate": generate, "metrics": metrics, "traffic": traffic}
    results = []
    if job.get("refusals"):
        for arguments in job["refusals"]:
            try:
                LLM(**arguments)
                results.append("")
            except Exception as error:
                results.append(f"{type(error).__name__}: {error}")
    else:
        llm = LLM(**job["llm"])
        results = [kinds[step["kind"]](llm, step) for step in job["steps"]]
    with open(sys.argv[2], "w") as out:
        json.dump(results, out)


if __name__ == "__main__":
    main()
