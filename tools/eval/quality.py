# SPDX-License-Identifier: MIT
"""Next-token distributions with one KV cache against those with an FP16 cache, by stock llama-perplexity."""
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from .llama import F16, Cache, kv_memory, run_tool, with_last_words

BATCH = 512  # at most a window: attention reads what the tokens before the batch, and those of the batch, have written


@dataclass(frozen=True)
class Quality:
    """One measurement: windows of a text, of n_ctx tokens each, of which the second half is scored."""
    cache: Cache
    text: Path
    n_ctx: int
    n_chunks: int
    is_chat: bool = False  # rendered by chat.py
    most_at_once: int = BATCH  # tokens of a batch; 1: each is decoded by itself

    @property
    def name(self):
        return self.cache.name

    @property
    def tokens(self):
        return self.n_ctx * self.n_chunks

    @property
    def batch(self):
        return min(self.most_at_once, self.n_ctx)


LABELS = {  # of the lines that have one figure, or one with its error
    "kld_mean": r"Mean\s+KLD", "kld_median": r"Median\s+KLD", "kld_99": r"99\.0%\s+KLD", "kld_99_9": r"99\.9%\s+KLD",
    "kld_max": r"Maximum KLD", "same_top_1": r"Same top p", "dp_rms": r"RMS Δp", "ppl_ratio": r"Mean PPL\(Q\)/PPL\(base\)",
    "ppl": r"Mean PPL\(Q\)",
}
HEADER = struct.Struct("<8s3i")  # of a file of logits: "_logits_", n_ctx, n_vocab, n_chunks
LAST_WORDS = "Same top p: "  # with the colon, which the head of the table over all windows lacks
NUMBER = r"(-?[\d.]+(?:e[-+]?\d+)?|-?nan|-?inf)"


def parse_statistics(log):
    """The figures of llama-perplexity's comparison, {name: value} and {name_error: standard error} where it prints one."""
    figures = {}
    for name, label in LABELS.items():
        match = re.search(rf"^{label}\s*:\s*{NUMBER}%?(?:\s*±\s*{NUMBER})?", log, re.MULTILINE)
        if not match:
            return None
        figures[name] = float(match.group(1))
        if match.group(2):
            figures[f"{name}_error"] = float(match.group(2))
    # Rounding may leave less than nothing, or -0, where there is nothing. Of equals max takes the first.
    return {**figures, "kld_mean": max(0.0, figures["kld_mean"])}


def options(quality):
    return ["-f", quality.text, "-c", quality.n_ctx, "--chunks", quality.n_chunks, "-b", quality.batch, "-lv", "4"]


def base_arguments(quality, base):
    return [*options(quality), "--kl-divergence-base", base]


def measure_arguments(quality, base):
    return [*base_arguments(quality, base), "--kl-divergence"]


def counted(quality, on_tokens):
    """run_command's on_step, which tells of tokens: of a batch in each step but the first, which warms up."""
    return on_tokens and (lambda n: on_tokens(min(max(n - 1, 0) * quality.batch, quality.tokens)))


def write_base(setup, quality, base, on_tokens=None):
    """Keep the FP16 cache's logits in the file `base`. on_tokens(how many tokens so far) is called meanwhile."""
    done = run_tool(setup, F16, "perplexity", base_arguments(quality, base), on_step=counted(quality, on_tokens),
                    reads_special=quality.is_chat)
    if not base.exists() or base.stat().st_size < quality.n_ctx * 256:  # no vocabulary is so small
        raise done.fail(f"wrote no logits: {quality.text.name} may be too short for a window of {quality.n_ctx} tokens")


def base_tokens(base):
    """The tokens that a file of logits is of."""
    with open(base, "rb") as file:
        _, n_ctx, _, n_chunks = HEADER.unpack(file.read(HEADER.size))
        return struct.unpack(f"<{n_ctx * n_chunks}i", file.read(4 * n_ctx * n_chunks))


def base_bytes(quality, n_vocab):
    """What write_base takes on the disk: 16 bits for each token of the vocabulary and scored token, and a little."""
    return quality.n_chunks * (quality.n_ctx // 2) * (2 * n_vocab + 64)


def measure(setup, quality, base, *plugin_options, on_tokens=None):
    """The figures of one cache against `base`, and what it costs. on_tokens: as write_base's."""
    arguments = measure_arguments(quality, base)
    done = with_last_words(LAST_WORDS, lambda: run_tool(setup, quality.cache, "perplexity", arguments, *plugin_options,
                                                    on_step=counted(quality, on_tokens)))
    figures = parse_statistics(done.log)
    if not figures:
        raise done.fail("printed no statistics")
    mib, bits = kv_memory(done)
    return {**figures, "kv_mib": mib, "bits_per_value": bits, "peak_rss_mib": done.peak_rss / 2**20, "seconds": done.seconds,
            "notes": [line.partition("turboquant: ")[2] for line in done.log.splitlines() if "turboquant: guard" in line],
            "command": done.command.replace(str(base), "logits.kld")}
