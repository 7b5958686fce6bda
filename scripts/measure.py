# SPDX-License-Identifier: MIT
"""Measurements of a KV cache through stock llama.cpp tools, for report.py. Every function returns figures and the command."""
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Setup:
    llama_bin: Path
    plugin: Path
    model: Path
    threads: int


@dataclass
class Case:
    """One kind of KV cache: stock llama.cpp with a cache type, or one of our devices."""
    name: str

    @property
    def is_stock(self):
        return self.name.lower() in ("f16", "q8_0", "q4_0")

    def options(self, setup):
        """Options of all tools. Without -dev none a stock run would be free to use our devices."""
        common = ["-fa", "on", "-t", str(setup.threads)]
        if self.is_stock:
            kind = self.name.lower()
            return ["-ctk", kind, "-ctv", kind, "-dev", "none", *common]
        return ["-dev", self.name, "-ngl", "999", *common]


@dataclass
class Finished:
    output: str
    errors: str
    peak_rss: int  # bytes
    command: str


def machine():
    """The CPU's name and the number of cores, for tables."""
    try:
        names = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else 'unknown CPU'}, {os.cpu_count()} cores"


def commit():
    found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def shown(command):
    """The command as one would type it in the root of the repository."""
    parts = [str(part).replace(str(ROOT) + "/", "") for part in command]
    return " ".join(f"'{part}'" if re.search(r"[\s<>|]", part) else part for part in parts)


def run_tool(setup, tool, arguments):
    """Run a llama.cpp tool with the plug-in in reach, and take its own peak of resident memory."""
    command = [setup.llama_bin / f"llama-{tool}", "-m", setup.model, *arguments]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                                   env={**os.environ, "GGML_BACKEND_PATH": str(setup.plugin)})
        # wait4 gives this child's usage; getrusage(RUSAGE_CHILDREN) would give the largest of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        done = Finished(output.read().decode(errors="replace"), errors.read().decode(errors="replace"),
                        usage.ru_maxrss * 1024, "GGML_BACKEND_PATH=" + shown([setup.plugin]) + " " + shown(command))
    if process.returncode:
        raise RuntimeError(f"{done.command}\nended with {process.returncode}:\n" + "\n".join(done.errors.splitlines()[-15:]))
    return done


def measure_answer(setup, case, prompt_file, n_ctx, n_predict):
    """The greedy answer to a prompt."""
    done = run_tool(setup, "completion", ["-f", prompt_file, "-n", n_predict, "-c", n_ctx, "--temp", "0", "-no-cnv",
                                          "--no-display-prompt", *case.options(setup)])
    return done.output.replace("[end of text]", "").strip()


def measure_speed(setup, case, depths, n_prompt, n_gen, repetitions):
    """Tokens per second of llama-bench: prefill of n_prompt and decode of n_gen tokens after `depth` tokens."""
    done = run_tool(setup, "bench", ["-p", n_prompt, "-n", n_gen, "-d", ",".join(map(str, depths)), "-r", repetitions,
                                     "-o", "json", *case.options(setup)])
    figures = {"command_speed": done.command}
    for test in json.loads(done.output):
        kind = "prefill" if test["n_prompt"] else "decode"
        figures[f"{kind}_d{test['n_depth']}"] = test["avg_ts"]
    return figures


def quality_options(setup, case, text, n_ctx, n_chunks):
    return ["-f", text, "-c", n_ctx, "--chunks", n_chunks, "-b", "512", "-lv", "4", *case.options(setup)]


def write_base(setup, case, text, n_ctx, n_chunks, base):
    """Keep the reference's logits (some 200 MB a chunk of 4096 tokens) in the file `base`."""
    run_tool(setup, "perplexity", [*quality_options(setup, case, text, n_ctx, n_chunks), "--kl-divergence-base", base])


def measure_quality(setup, case, text, n_ctx, n_chunks, base):
    """
    llama-perplexity's comparison of the next-token distributions with those in `base`, and the memory that it took: every
    cell of the cache is filled, so that the peak counts all of it whether or not a cache touches cells before they are used.
    """
    arguments = [*quality_options(setup, case, text, n_ctx, n_chunks), "--kl-divergence-base", base, "--kl-divergence"]
    for _ in range(3):  # the tool's log is written by a thread that may be dropped at the end
        done = run_tool(setup, "perplexity", arguments)
        text = done.output + done.errors
        if "Same top p" in text:
            break
    # llama.cpp loads a model twice, first without memory to see what fits: the last line of a buffer counts.
    sizes = {name: float(mib) for name, mib in re.findall(r"(\S+) KV buffer size =\s+([\d.]+) MiB", text)}
    if not sizes:
        raise RuntimeError(f"{done.command}\nprinted no KV buffer size")

    def figure(label):
        match = re.search(label + r"\s*:\s*([-\d.]+)", text)
        if not match:
            raise RuntimeError(f"{done.command}\nprinted no '{label}'")
        return float(match.group(1))

    return {"kv_mib": sum(sizes.values()), "peak_rss_mib": done.peak_rss / 2**20,
            "mean_kld": abs(figure("Mean +KLD")), "kld_99_9": figure(r"99\.9% +KLD"), "same_top_1": figure("Same top p"),
            "command_quality": done.command.replace(str(base), "logits.kld")}
