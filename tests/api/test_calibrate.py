#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tq calibrate: its mathematics by definition, its file byte by byte, and whole runs on records of a stand-in for llama.cpp."""
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import BUILD, ROOT, main  # noqa: E402

sys.path.insert(0, str(ROOT / "tools"))
import numpy as np  # noqa: E402
import xxhash  # noqa: E402

from calibrate import file, observe, transform  # noqa: E402
from calibrate.__main__ import Moments  # noqa: E402
from eval.llama import LlamaError, Setup  # noqa: E402

TQ = BUILD / "tq"
HEAD_DIM = 8
SECONDS = 60  # in which a program that hangs has failed

# Writes the file `records` to the pipe, and then does what the file `mode` says.
STAND_IN = """#!{python}
import json, os, pathlib, re, sys, time
folder = pathlib.Path(__file__).parent
mode = (folder / "mode").read_text()
if "--version" in sys.argv:
    print("version: 0")
elif "--list-devices" in sys.argv:
    print("  none" if mode == "no device" else "  TQ4: KV cache, 4.59 bits per value")
elif "-p" in sys.argv:
    print("print_info: general.name = Stand-in\\nprint_info: n_ctx_train = 4096\\nprint_info: n_vocab = 100")
else:
    (folder / "call").write_text(json.dumps([sys.argv[1:], os.environ["TQ_GGML"]]))
    if mode == "dies early":
        sys.exit("out of luck")
    if mode == "short":
        print("perplexity: you need at least 4096 tokens to evaluate perplexity with a context of 2048\\n"
              "perplexity: the data file you provided tokenizes to only 61 tokens")
    elif mode != "silent":
        pipe = re.search(r"observe=((?:\\\\.|[^,])*)", os.environ["TQ_GGML"]).group(1).replace("\\\\,", ",")
        for record in sorted(folder.glob("record*")):
            with open(pipe, "ab") as out:  # as the plug-in, or once for each
                out.write(record.read_bytes())
        if mode == "hangs":
            (folder / "pid").write_text(str(os.getpid()))
            time.sleep(1000)
        if mode == "dies late":
            sys.exit("out of luck")
"""


def make_record(seed, layer, softcap=0.0, n_query=90, n_col=96, window=1000):
    """A record whose padding holds rubbish: (bytes, what they mean)."""
    random = np.random.default_rng(seed)
    shape = random.normal(size=(HEAD_DIM, HEAD_DIM))
    q = (random.normal(size=(n_query, 4, HEAD_DIM)) @ shape).astype("<f4")
    k = (random.normal(size=(n_col, 2, HEAD_DIM)) + 3).astype("<f4")
    distance = np.arange(n_query)[:, None] - np.arange(n_col)
    visible = (distance >= 0) & (distance < window)
    visible[17] = False  # a query that sees nothing
    k[n_query:] = 1e6
    mask = np.where(visible, 0, -np.inf).astype("<f2")
    header = struct.pack("<4s6i2f", b"TQOB", layer, n_query, 4, 2, HEAD_DIM, n_col, 0.25, softcap)
    meaning = types.SimpleNamespace(layer=layer, q=q.astype(float), k=k.astype(float), visible=visible, softcap=softcap)
    return header + q.tobytes() + k.tobytes() + mask.tobytes(), meaning


def moments_by_definition(records, n_sink, n_recent, ref):
    """{layer: (K, Q)}, a query and a column at a time."""
    sums = {}
    for r in records:
        of_keys, of_queries = sums.setdefault(r.layer, (np.zeros((2, HEAD_DIM, HEAD_DIM)), np.zeros((2, HEAD_DIM, HEAD_DIM))))
        n_used = r.visible.any(0).nonzero()[0].max() + 1
        for head in range(4):
            keys = r.k[:n_used, head // 2]
            centered = [k - keys[c // ref * ref:c // ref * ref + ref].mean(0) if ref else k for c, k in enumerate(keys)]
            for q, visible in zip(0.25 * r.q[:, head], r.visible):
                columns = visible.nonzero()[0]
                if not len(columns):
                    continue
                logits = keys[columns] @ q
                if r.softcap:
                    logits = r.softcap * np.tanh(logits / r.softcap)
                weights = np.exp(logits - logits.max())
                for c, p in zip(columns, weights / weights.sum()):
                    if c >= n_sink and c <= columns.max() - n_recent:
                        of_keys[head // 2] += p * np.outer(centered[c], centered[c])
                        of_queries[head // 2] += p * np.outer(q, q)
    return sums


def random_moments(seed):
    random = np.random.default_rng(seed)
    k, q = (random.normal(size=(400, 16)) @ random.normal(size=(16, 16)) for _ in range(2))
    return k, q, k.T @ k, q.T @ q


class Mathematics(unittest.TestCase):
    def assert_near(self, a, b, tolerance):
        self.assertLess(np.abs(a - b).max(), tolerance * np.abs(b).max())

    def test_balance(self):
        _, _, of_keys, of_queries = random_moments(1)
        a = transform.balance(of_keys, of_queries)
        inverse = np.linalg.inv(a)
        self.assert_near(a, a.T, 1e-9)
        self.assertGreater(np.linalg.eigvalsh(a).min(), 0)
        self.assert_near(a @ of_keys @ a, inverse @ of_queries @ inverse, 1e-7)

    def test_transform(self):
        k, q, of_keys, of_queries = random_moments(2)
        lower = transform.factor(of_keys, of_queries)
        self.assertTrue((lower == np.tril(lower)).all() and (np.diag(lower) > 0).all())
        inverse = np.linalg.inv(lower)
        self.assert_near((k @ lower) @ (q @ inverse.T).T, k @ q.T, 1e-9)
        self.assertAlmostEqual(np.trace(lower.T @ of_keys @ lower) / np.trace(of_keys), 1, delta=1e-9)
        # The least error that a linear transform can give: the squared sum of the roots of K Q's eigenvalues.
        least = np.sqrt(np.linalg.eigvals(of_keys @ of_queries).real.clip(0)).sum() ** 2
        self.assertAlmostEqual(np.trace(of_keys) * np.trace(inverse @ of_queries @ inverse.T) / least, 1, delta=1e-5)

    def test_solution(self):
        """That of moments shrunk by 0.3, in bfloat16; it gains less than the best for what was seen, and not nothing."""
        _, _, of_keys, of_queries = random_moments(6)
        shrunk = [0.7 * m + 0.3 * np.trace(m) / 16 * np.eye(16) for m in (of_keys, of_queries)]
        solved = transform.solve(of_keys, of_queries)
        self.assert_near(solved.matrix, transform.factor(*shrunk), 0.01)
        lower, inverse = solved.matrix, np.linalg.inv(solved.matrix)
        gain = np.trace(of_keys) * np.trace(of_queries) / (np.trace(lower.T @ of_keys @ lower) *
                                                           np.trace(inverse @ of_queries @ inverse.T))
        self.assertAlmostEqual(solved.gain, gain, delta=1e-6)
        self.assertGreater(gain, 1.05)

    def test_what_was_not_learnt_is_the_identity(self):
        _, _, of_keys, of_queries = random_moments(3)
        for keys, queries in ((0 * of_keys, of_queries), (of_keys, 0 * of_queries), (of_keys * np.nan, of_queries),
                              (of_keys, of_queries + np.inf)):
            solved = transform.solve(keys, queries)
            self.assertTrue((solved.matrix == np.eye(16)).all())
            self.assertEqual(solved.gain, 1)

    def test_order_of_channels(self):
        k, q, of_keys, of_queries = random_moments(5)
        moved = [np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1) for x in (k, q)]
        for moments, x in zip((of_keys, of_queries), moved):
            self.assert_near(transform.to_halves(moments), x.T @ x, 1e-12)

    def test_few_tokens(self):
        """Moments of a low rank leave directions undetermined; the transform must be good for any key all the same."""
        k, q, _, _ = random_moments(4)
        solved = transform.solve(k[:2].T @ k[:2], q[:1].T @ q[:1])
        self.assertLess(np.linalg.cond(solved.matrix), 1e4)
        self.assertGreater(solved.gain, 1)

    def test_bfloat16(self):
        cases = {1 + 2**-8: 0x3f80, 1 + 3 * 2**-8: 0x3f82, 1 + 2**-8 + 2**-20: 0x3f81, -2.5: 0xc020, 0: 0}
        self.assertEqual(transform.to_bfloat16(np.array(list(cases))).tolist(), list(cases.values()))
        self.assertEqual(transform.from_bfloat16(np.array([0x3f82, 0xc020], np.uint16)).tolist(), [1 + 2**-6, -2.5])


class File(unittest.TestCase):
    def test_bytes(self):
        bits = [np.tril(np.arange(9, dtype=np.uint16).reshape(3, 3) + 100 * i) for i in range(2)]
        heads = [transform.Transform(b, 1.0) for b in bits]
        content = file.pack([heads, [], heads[1:]], "Modell", 4, 64, 32)
        self.assertEqual(content[:8], bytes([0x89]) + b"TQCAL\r\n")
        self.assertEqual(struct.unpack_from("<Ii", content, 8), (1, 3))
        self.assertEqual(struct.unpack_from("<Q", content, 16), (xxhash.xxh3_64_intdigest(content[24:]),))
        self.assertEqual(struct.unpack_from("<4i", content, 24), (4, 64, 32, 0))
        self.assertEqual(content[40:104], b"Modell" + bytes(58))
        self.assertEqual(struct.unpack_from("<6i", content, 104), (2, 3, 0, 0, 1, 3))
        values = [0, 3, 4, 6, 7, 8, 100, 103, 104, 106, 107, 108, 100, 103, 104, 106, 107, 108]
        self.assertEqual(content[128:], struct.pack("<18H", *values))

    def test_long_name(self):
        content = file.pack([], "x" * 62 + "\u00e9", 0, 0, 0)
        self.assertEqual(content[40:104], b"x" * 62 + bytes(2))

    def test_all_or_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "out"
            file.write_whole(path, b"first")
            file.write_whole(path, b"second")
            self.assertEqual(path.read_bytes(), b"second")
            (Path(folder) / "taken").mkdir()
            with self.assertRaises(OSError):
                file.write_whole(Path(folder) / "taken", b"third")
            self.assertEqual(sorted(p.name for p in Path(folder).iterdir()), ["out", "taken"])


class WithStandIn(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.bin, self.out = self.folder / "bin", self.folder / "out"
        self.bin.mkdir()
        self.out.mkdir()
        program = self.bin / "llama-perplexity"
        program.write_text(STAND_IN.format(python=sys.executable))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.model, self.text = self.folder / "model.gguf", self.folder / "text.txt"
        self.model.write_text("")
        self.text.write_text("")

    def write(self, *records, mode="writes"):
        for old in self.bin.glob("record*"):
            old.unlink()
        for i, record in enumerate(records):
            (self.bin / f"record{i}").write_bytes(record)
        (self.bin / "mode").write_text(mode)

    def command(self, *more, output="model.tqcal"):
        return [sys.executable, "-I", ROOT / "tools/start_package.py", "calibrate", self.model, "--text", self.text, "-o",
                self.out / output, "--llama-bin", self.bin, "--plugin", self.model, "--context", "256", *more]

    def calibrate(self, *more, **options):
        return subprocess.run([str(word) for word in self.command(*more, **options)], capture_output=True, text=True,
                              timeout=SECONDS)


class Observation(WithStandIn):
    def test_moments_by_definition(self):
        made = [make_record(1, 0), make_record(2, 2, softcap=2.0), make_record(3, 0), make_record(4, 2, softcap=2.0, window=40)]
        self.write(*(record for record, _ in made))
        setup = Setup(self.bin, self.model, self.model, 1)
        self.addCleanup(setattr, transform, "SLAB", transform.SLAB)
        transform.SLAB = 32
        for n_sink, n_recent, ref in ((4, 16, 32), (0, 0, 0), (1, 64, 64)):
            moments = Moments(types.SimpleNamespace(sinks=n_sink, recent=n_recent, ref=ref, order="same"))
            n_windows = observe.observe(setup, self.text, 256, 2, moments.add)
            self.assertEqual((n_windows, set(moments.layers)), (2, {0, 2}))
            expected = moments_by_definition([meaning for _, meaning in made], n_sink, n_recent, ref)
            for layer, pair in expected.items():
                for got, right in zip(moments.layers[layer], pair):
                    for head in range(2):
                        self.assertLess(np.abs(got[head] - right[head]).max(), 1e-4 * np.abs(right[head]).max())

    def test_what_is_no_record(self):
        record, _ = make_record(1, 0)
        setup = Setup(self.bin, self.model, self.model, 1)
        for wrong, message in ((b"GGUF" + record[4:], "something else than records: b'GGUF'"), (record[:-1], "within a record"),
                               (record[:20], "within a record"), (record + b"TQOB", "within a record"),
                               (record[:16] + struct.pack("<i", 3) + record[20:], "which cannot be"),
                               (record[:12] + struct.pack("<i", 0) + record[16:], "which cannot be")):
            self.write(wrong)
            with self.assertRaisesRegex(LlamaError, message):
                observe.observe(setup, self.text, 256, 1, lambda record: None)

    def test_layer_that_changes_its_shape(self):
        moments = Moments(types.SimpleNamespace(sinks=0, recent=0, ref=0))
        one = observe.Record(0, np.ones((1, 2, 8), np.float32), np.ones((1, 2, 8), np.float32), np.ones((1, 1), bool), 0.0)
        moments.add(one)
        one.keys = np.ones((1, 1, 8), np.float32)
        with self.assertRaisesRegex(LlamaError, "changes its shape"):
            moments.add(one)


class Command(WithStandIn):
    def check_error(self, message, *more, **options):
        done = self.calibrate(*more, **options)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(message, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_run(self):
        made = [make_record(1, 0), make_record(2, 2), make_record(3, 0), make_record(4, 2)]
        self.write(*(record for record, _ in made))
        done = self.calibrate("--json", self.out / "gains.json", "--recent", "16", "--ref", "32")
        self.assertEqual(done.returncode, 0, done.stderr)
        path = self.out / "model.tqcal"
        content = path.read_bytes()
        self.assertIn(f"2 layers of 2 KV heads, head_dim {HEAD_DIM}, from 2 windows", done.stdout)
        self.assertIn(f"{len(content)} bytes; use it by TQ_GGML=calibration={path}", done.stdout)
        self.assertEqual(struct.unpack_from("<4i", content, 24), (4, 16, 32, 0))
        self.assertEqual(content[40:48], b"Stand-in")
        self.assertEqual(struct.unpack_from("<6i", content, 104), (2, HEAD_DIM, 0, 0, 2, HEAD_DIM))
        gains = json.loads((self.out / "gains.json").read_text())["layers"]
        self.assertEqual([(layer["layer"], len(layer["heads"])) for layer in gains], [(0, 2), (1, 0), (2, 2)])
        self.check_matrices(content[128:], gains, moments_by_definition([meaning for _, meaning in made], 4, 16, 32))

    def test_odd_names_a_poor_locale_and_a_full_disk(self):
        record, _ = make_record(1, 0)
        self.write(record)
        temporary, real = self.folder / "a,b", self.folder / "real"
        temporary.mkdir()
        real.write_text("")
        (self.out / "lin,k \u00fc").symlink_to(real)
        environment = {**os.environ, "TMPDIR": str(temporary), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        command = [str(word) for word in self.command("--chunks", "1", output="lin,k \u00fc")]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(b"use it by TQ_GGML='calibration=", done.stdout)
        self.assertTrue((self.out / "lin,k \u00fc").is_symlink())
        self.assertTrue(real.read_bytes().startswith(file.MAGIC))
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=SECONDS, env=environment)
        self.assertEqual(done.returncode, 1)
        self.assertIn("No space left on device", done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertNotIn("Exception", done.stderr)

    def test_order_halves(self):
        record, meaning = make_record(1, 0)
        self.write(record)
        done = self.calibrate("--chunks", "1", "--order", "halves")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn('TurboQuantCache(model.config, calibration="', done.stdout)
        keys, queries = (transform.to_halves(part[0]) for part in moments_by_definition([meaning], 4, 64, 64)[0])
        n = HEAD_DIM * (HEAD_DIM + 1) // 2
        first = np.frombuffer((self.out / "model.tqcal").read_bytes()[104 + 8:], "<u2")[:n]
        self.assertEqual(first.tolist(), transform.solve(keys, queries).bits[np.tril_indices(HEAD_DIM)].tolist())

    def check_matrices(self, values, gains, moments):
        """The file's matrices solve (L L^T) K (L L^T) ~ Q, which says nothing of how they were found."""
        size = HEAD_DIM * (HEAD_DIM + 1)
        self.assertEqual(len(values), 4 * size)
        for i, (layer, head) in enumerate((layer, head) for layer in (0, 2) for head in range(2)):
            lower = np.zeros((HEAD_DIM, HEAD_DIM))
            lower[np.tril_indices(HEAD_DIM)] = transform.from_bfloat16(np.frombuffer(values, "<u2")[i * size // 2:][:size // 2])
            of_keys, of_queries = (part[head] for part in moments[layer])
            square = lower @ lower.T
            shrunk, wanted = transform.shrink(of_keys), transform.shrink(of_queries)
            found = square @ shrunk @ square
            found *= np.trace(wanted) / np.trace(found)
            self.assertLess(np.abs(found - wanted).max(), 0.05 * np.abs(wanted).max())
            self.assertAlmostEqual(np.trace(lower.T @ shrunk @ lower) / np.trace(shrunk), 1, delta=0.01)
            after = lower.T @ of_keys @ lower
            inverse = np.linalg.inv(lower)
            gain = np.trace(of_keys) * np.trace(of_queries) / np.trace(after) / np.trace(inverse @ of_queries @ inverse.T)
            self.assertAlmostEqual(gains[layer]["heads"][head]["gain"] / gain, 1, delta=1e-3)

    def test_how_llama_is_called(self):
        self.write(make_record(1, 0)[0])
        self.assertEqual(self.calibrate("--chunks", "1").returncode, 0)
        words, options = json.loads((self.bin / "call").read_text())
        for option, value in (("-c", "256"), ("-b", "256"), ("-ub", "256"), ("--chunks", "1"), ("-dev", "TQ4"), ("-fa", "on")):
            self.assertEqual(words[words.index(option) + 1], value)
        self.assertIn("--no-warmup", words)
        self.assertTrue(options.startswith("k=f16,v=f16,sinks=0,recent=0,ref=0,observe="))

    def test_nothing_but_exact_tokens(self):
        self.write(make_record(1, 0)[0])
        self.assertEqual(self.calibrate("--recent", "100", "--chunks", "1").returncode, 0)
        content = (self.out / "model.tqcal").read_bytes()
        identity = transform.to_bfloat16(np.eye(HEAD_DIM))[np.tril_indices(HEAD_DIM)].tobytes()
        self.assertEqual(content[112:], 2 * identity)

    def test_text_with_fewer_windows(self):
        self.write(make_record(1, 0)[0])
        done = self.calibrate("--chunks", "3")
        self.assertEqual(done.returncode, 0)
        self.assertIn("1 of 3 windows", done.stderr)

    def test_program_that_fails(self):
        record, _ = make_record(1, 0)
        self.write(record, mode="dies early")
        self.check_error("out of luck")
        self.write(record, mode="dies late")
        self.check_error("out of luck")
        self.write(record[:-50], mode="dies late")
        self.check_error("out of luck")
        self.write(record, mode="short")
        self.check_error("has 61 tokens; llama-perplexity asks for two windows, 512 tokens")
        self.write(record, mode="silent")
        self.check_error("no keys and queries came")
        self.write(record, mode="no device")
        self.check_error("does not load")

    def test_stream_that_is_wrong(self):
        record, _ = make_record(1, 0)
        self.write(b"GGUF" + record[4:])
        self.check_error("something else than records")
        self.write(record[:-1])
        self.check_error("end within a record")
        self.write(record, make_record(2, 1)[0], record)
        self.check_error("end within a window")

    def test_errors_before_the_run(self):
        self.write(make_record(1, 0)[0])
        self.check_error("there is no folder", output="absent/model.tqcal")
        self.check_error("there is no folder", "--json", self.out / "absent/gains.json")
        self.check_error("is a folder", output="")
        self.check_error("both name", "--json", self.out / "model.tqcal")
        self.check_error("which is read", "--json", self.model)
        self.check_error("is not a regular file", "--json", "/dev/null")
        self.assertTrue(Path("/dev/null").is_char_device())
        self.check_error("does not exist", "--text", "no-such-text")
        self.check_error("4096 tokens; 8192 are too many", "--context", "8192")
        self.check_error("llama-perplexity was not found", "--llama-bin", self.out)
        self.check_error("no-such.so does not exist", "--plugin", "no-such.so")
        self.check_error("at least 256", "--context", "100")
        self.check_error("must be more than", "--recent", "252")
        self.assertFalse((self.bin / "call").exists())

    def test_interrupt(self):
        self.write(make_record(1, 0)[0], mode="hangs")
        process = subprocess.Popen([str(word) for word in self.command()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job ignores it
        self.addCleanup(process.kill)
        pid_file = self.bin / "pid"
        deadline = time.monotonic() + SECONDS
        while not (pid_file.exists() and pid_file.read_text()):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
        self.assertEqual(process.returncode, 130)
        self.assertIn("was not written", errors)
        self.assertNotIn("Traceback", errors)
        self.assertEqual(list(self.out.iterdir()), [])
        with self.assertRaises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)

    def test_tq(self):
        done = subprocess.run([TQ, "calibrate", "--help"], capture_output=True, text=True,
                              env={**os.environ, "TQ_PYTHON": sys.executable})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("usage: tq calibrate", done.stdout)


if __name__ == "__main__":
    main()
