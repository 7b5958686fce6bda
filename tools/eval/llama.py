# SPDX-License-Identifier: MIT
"""Running stock llama.cpp programs on one kind of KV cache. It is all that this project's measurements know of llama.cpp."""
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOCK_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
NO_FLASH = " -fa off"
SERVER_START_SECONDS = 600  # a large model from a slow disk
FLUSH_LOG = "libtq-flush-log.so"  # tools/flush_log.c; it lies next to the plug-in
STEPS, READ_SPECIAL = "TQ_HOST_STEPS", "TQ_HOST_SPECIAL"  # what it is told by
POLL_SECONDS = 0.1
LOG_TRIES = 5


class LlamaError(RuntimeError):
    """A llama.cpp program failed or did not print what it should; the message has its command and its last lines."""


@dataclass
class Setup:
    llama_bin: Path
    plugin: Path  # None: without, for stock caches
    model: Path
    threads: int
    stock_device: str = "none"  # that computes with stock caches, by its name in llama.cpp; none: the CPU
    inner: str = ""  # the plug-in's devices are those that stand in front of this one


def path_option(name, path):
    """An option of the plug-in that names a file: a comma would end it, so that it takes a backslash."""
    escaped = re.sub(r"([\\,])", r"\\\1", str(path))
    return f"{name}={escaped}"


@dataclass(frozen=True)
class Cache:
    """
    One kind of KV cache, by the name that it has on the command line and in reports: a type of llama.cpp (q8_0), one for keys
    and one for values (q8_0/q4_0), or a device of the plug-in, with options after a colon (TT4:v=tt3,recent=32).
    """
    name: str

    @property
    def types(self):
        """llama.cpp's types of keys and of values."""
        keys, _, values = self.name.removesuffix(NO_FLASH).partition("/")
        return keys, values or keys

    @property
    def is_stock(self):
        return all(kind in STOCK_TYPES for kind in self.types)

    @property
    def device(self):
        return self.name.partition(":")[0].upper()

    @property
    def plugin_options(self):
        return self.name.partition(":")[2]

    @property
    def files(self):
        """What the plug-in reads besides its options."""
        named = [re.sub(r"\\([\\,])", r"\1", path) for path in
                 re.findall(r"(?:^|,)calibration=((?:\\[\\,]|[^,])+)", self.plugin_options)]
        return [Path(path) for path in named if Path(path).is_file()]

    def options(self, setup):
        """Options of all tools."""
        common = ["-fa", "off" if self.name.endswith(NO_FLASH) else "on", "-t", str(setup.threads)]
        if self.is_stock:
            keys, values = self.types
            layers = [] if setup.stock_device == "none" else ["-ngl", "999"]
            return ["-ctk", keys, "-ctv", values, "-dev", setup.stock_device, *layers, *common]
        return ["-dev", "-".join(filter(None, [self.device, setup.inner])), "-ngl", "999", *common]

    def variables(self, setup, *more_options):
        """The environment that the plug-in reads. A stock run does without the plug-in."""
        if self.is_stock:
            return {}
        inner = setup.inner and f"inner={setup.inner}"
        options = ",".join(filter(None, [inner, self.plugin_options, *more_options]))
        return {"GGML_BACKEND_PATH": str(setup.plugin), **({"TQ_GGML": options} if options else {})}


F16 = Cache("f16")
F16_NO_FLASH = Cache("f16" + NO_FLASH)


@dataclass
class Finished:
    output: str
    errors: str
    status: int
    peak_rss: int  # bytes
    seconds: float
    command: str

    @property
    def log(self):
        return self.output + self.errors

    def fail(self, what):
        """An error that shows how to see it again."""
        last = "\n".join(self.log.strip().splitlines()[-15:])
        return LlamaError(f"{what}: {self.command}\n{last}")


def machine():
    """The CPU's name and the number of cores, for tables."""
    try:
        names = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else 'unknown CPU'}, {os.cpu_count()} cores"


def commit():
    try:
        found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def shown(command, variables=()):
    """The command as one would type it in the root of the repository."""
    parts = [f"{name}={value}" for name, value in dict(variables).items()] + [str(part) for part in command]
    parts = [part.replace(str(ROOT) + "/", "") for part in parts]
    return " ".join(f"'{part}'" if re.search(r"[\s<>|]", part) else part for part in parts)


def preload(env, plugin):
    """
    The environment `env` in which llama.cpp's programs write their whole log. They write it from a thread that they do not wait
    for, so that its end may be missing otherwise.
    """
    library = plugin.parent / FLUSH_LOG if plugin else None
    if not library or not library.exists() or re.search(r"[\s:]", str(library)):  # which ld.so takes for the end of a name
        return env
    return {**env, "LD_PRELOAD": " ".join(filter(None, [env.get("LD_PRELOAD"), str(library)]))}


def with_last_words(last_words, run):
    """
    What run() returns, with the last words of its log. Where `preload` cannot help (programs linked statically, say), another
    run may have what is missing in the first.
    """
    for _ in range(LOG_TRIES):
        done = run()
        if done.status or last_words in done.log:
            return done
    raise done.fail(f"the log has no '{last_words}', in {LOG_TRIES} runs")


def environment(setup, variables):
    """This process's without what would change a measurement behind its command's back."""
    hidden = ("LLAMA_ARG_", "GGML_BACKEND_PATH", "TQ_GGML", "TQ_HOST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return preload({**kept, **variables}, setup.plugin)


@contextlib.contextmanager
def started(setup, command, variables, output, errors):
    """A running process that does not outlive the block, however that is left."""
    process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                               env=environment(setup, variables))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def follow(process, path, on_step):
    """on_step(how many graphs it has computed) until a process ends, whose status stays for the caller to take."""
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        on_step(os.stat(path).st_size)
        time.sleep(POLL_SECONDS)


def run_command(setup, command, variables=None, meanwhile=None, on_step=None, reads_special=False):
    """
    Run to the end, whatever the status, and take the process's own peak of resident memory. meanwhile(process) is called while
    it runs; what that raises ends the process. on_step: of `follow`, in its place. reads_special: texts have special tokens.
    """
    variables = variables or {}
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile() as steps:
        told = {STEPS: steps.name, **({READ_SPECIAL: "1"} if reads_special else {})}
        with started(setup, command, {**variables, **told}, output, errors) as process:
            if on_step:
                follow(process, steps.name, on_step)
            elif meanwhile:
                meanwhile(process)
            # wait4 gives this child's usage; getrusage(RUSAGE_CHILDREN) would give the largest of all children so far.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        return Finished(output.read().decode(errors="replace"), errors.read().decode(errors="replace"), process.returncode,
                        usage.ru_maxrss * 1024, time.monotonic() - begin, shown(command, variables))


def tool_command(setup, cache, tool, arguments):
    return [setup.llama_bin / f"llama-{tool}", "-m", setup.model, *arguments, *cache.options(setup)]


def run_tool(setup, cache, tool, arguments, *plugin_options, **more):
    """Run a llama.cpp tool on the model with this cache; more: run_command's."""
    command = tool_command(setup, cache, tool, arguments)
    done = run_command(setup, command, cache.variables(setup, *plugin_options), **more)
    if done.status:
        raise done.fail(f"ended with {done.status}")
    return done


def version(setup):
    """What llama.cpp says of itself."""
    return " ".join(run_command(setup, [setup.llama_bin / "llama-perplexity", "--version"]).log.split())


def list_devices(setup, cache):
    """The devices that the plug-in has with this cache's options; none and a log that says why if it does not take them."""
    done = run_command(setup, [setup.llama_bin / "llama-perplexity", "--list-devices"], cache.variables(setup))
    return re.findall(r"^  (\w+): KV cache", done.output, re.MULTILINE), done.errors.strip()


def describe_model(setup):
    """Name, context length and size of the vocabulary, from the log of a run that has too little text to do anything."""
    arguments = ["-p", "x", "-c", "256", "-b", "256", "--no-warmup", "-lv", "4"]
    done = with_last_words("n_vocab", lambda: run_tool(setup, F16, "perplexity", arguments))

    def figure(label):
        match = re.search(rf"print_info: {label}\s*= (.*)", done.log)
        if not match:
            raise done.fail(f"printed no {label}")
        return match.group(1).strip()

    return {"name": figure("general.name"), "n_ctx_train": int(figure("n_ctx_train")), "n_vocab": int(figure("n_vocab"))}


def kv_memory(done):
    """
    (MiB, bits per value or None) of the KV caches that a tool's log (-lv 4) tells of. A model may be loaded twice, first
    without memory to see what fits, so only what follows the last context counts; one with sliding windows has two caches.

    The bits are the plug-in's own figure, which has three decimals and counts all that it keeps. llama.cpp's own line comes
    before the plug-in knows the head_dim, and may be an upper bound then.
    """
    log = done.log[done.log.rfind("constructing llama_context"):]
    buffers = [float(mib) for mib in re.findall(r"KV buffer size =\s+([\d.]+) MiB", log)]
    ours = [(float(mib), float(bits)) for mib, bits in
            re.findall(r"turboquant: .* holds the KV cache: .* ([\d.]+) MiB, ([\d.]+) bits per value", log)]
    if not buffers:
        raise done.fail("printed no KV buffer size")
    if not ours:
        return sum(buffers), None
    if len(ours) < len(buffers):
        raise done.fail("a part of the KV cache is not in the plug-in")
    mib = sum(mib for mib, _ in ours)
    return mib, mib / sum(mib / bits for mib, bits in ours)


class Server:
    """A running llama-server, with its HTTP API."""

    def __init__(self, pid, command, log):
        self.pid, self.command, self.log = pid, command, log
        self.port = None

    def post(self, path, **body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise LlamaError(f"llama-server refused {path}: {error.read().decode(errors='replace')}") from error
        except OSError as error:
            raise LlamaError(f"llama-server died at {path}: {error}: {self.command}") from error

    def read_log(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


def server_command(setup, cache, arguments):
    return tool_command(setup, cache, "server", [*arguments, "--host", "127.0.0.1", "--port", "0", "--no-webui"])


@contextlib.contextmanager
def running_server(setup, cache, arguments):
    """llama-server, ready; it ends with the block. It chooses its port, which nobody can take before it does, and tells it."""
    command = server_command(setup, cache, arguments)
    variables = cache.variables(setup)
    shown_command = shown(command, variables).replace("--port 0 ", "")
    begin = time.monotonic()
    # The server's end of the log has a place of its own to write at, wherever ours reads.
    with tempfile.NamedTemporaryFile() as output, open(output.name, "rb") as log, \
            started(setup, command, variables, output, output) as process:
        server = Server(process.pid, shown_command, log)
        while not server.port:
            has_ended = process.poll() is not None
            listening = re.search(r"listening on http://127\.0\.0\.1:(\d+)\n", server.read_log())
            server.port = listening and int(listening[1])
            if not server.port and (has_ended or time.monotonic() - begin > SERVER_START_SECONDS):
                done = Finished(server.read_log(), "", process.returncode, 0, 0, server.command)
                raise done.fail("llama-server does not start")
            time.sleep(0.05)
        yield server
