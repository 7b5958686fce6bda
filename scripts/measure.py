# SPDX-License-Identifier: MIT
"""What `make run` measures beside the quality, which is tq eval's (tools/eval): an answer, speed, and memory."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from eval.llama import ROOT, Cache, Setup, commit, machine, run_tool, shown  # noqa: E402, F401
from eval.quality import Quality, measure, write_base  # noqa: E402


def measure_answer(setup, cache, prompt_file, n_ctx, n_predict):
    """The greedy answer to a prompt."""
    done = run_tool(setup, cache, "completion", ["-f", prompt_file, "-n", n_predict, "-c", n_ctx, "--temp", "0", "-no-cnv",
                                                 "--no-display-prompt"])
    return done.output.replace("[end of text]", "").strip()


def measure_speed(setup, cache, depths, n_prompt, n_gen, repetitions):
    """Tokens per second of llama-bench: prefill of n_prompt and decode of n_gen tokens after `depth` tokens."""
    done = run_tool(setup, cache, "bench", ["-p", n_prompt, "-n", n_gen, "-d", ",".join(map(str, depths)), "-r", repetitions,
                                            "-o", "json"])
    figures = {"command_speed": done.command}
    for test in json.loads(done.output):
        kind = "prefill" if test["n_prompt"] else "decode"
        figures[f"{kind}_d{test['n_depth']}"] = test["avg_ts"]
    return figures


def write_reference(setup, text, n_ctx, n_chunks, base):
    """Keep the FP16 cache's logits (some 200 MB a chunk of 4096 tokens) in the file `base`."""
    write_base(setup, Quality(Cache("f16"), text, n_ctx, n_chunks), base)


def measure_quality(setup, cache, text, n_ctx, n_chunks, base):
    """
    The comparison of the next-token distributions with those in `base`, and the memory that it took: every cell of the cache
    is filled, so that the peak counts all of it whether or not a cache touches cells before they are used.
    """
    figures = measure(setup, Quality(cache, text, n_ctx, n_chunks), base)
    kept = {key: figures[key] for key in ("kv_mib", "peak_rss_mib", "kld_mean", "kld_99_9", "same_top_1")}
    return {**kept, "command_quality": figures["command"]}
