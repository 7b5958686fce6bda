# SPDX-License-Identifier: MIT
"""
tq fold: models of every architecture that computes the same in stock llama.cpp with factors folded into it, what blocks of
weights bear, what a cache of few bits gains, and refusals, which leave nothing behind.
"""
import contextlib
import io
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import unittest
from unittest import mock

import gguf
import numpy as np

import common
from eval.llama import LlamaError, with_last_words
from test_factors import ARCHS

os.environ.setdefault("TURBOQUANT_LIBRARY", str(common.PLUGIN.parent / "libturboquant.so"))
from fold import blocks, check, factors, file  # noqa: E402
from fold.__main__ import main as fold  # noqa: E402
from fold.layers import HALVES, NEIGHBOURS, NO_ROPE, REFUSED, Model  # noqa: E402

TQ = common.PLUGIN.parent / "tq"
TEXT = common.path_from_env("TQ_TEXT")
Type = gguf.GGMLQuantizationType
FOLDED = [arch for arch in ARCHS if arch != "deepseek2"]  # which has no keys of its own


def any_factors(keys, _queries, partners):
    """In place of octaves_from_energies: by chance, the same ones for channels that turn together."""
    found = np.random.default_rng(1).integers(-3, 4, keys.shape)
    return np.minimum(found, found[:, partners])


class Case(common.TestCase):
    def setUp(self):
        self.out = self.directory / "out.gguf"
        self.addCleanup(lambda: self.out.unlink(missing_ok=True))

    def fold(self, model, *arguments, out=None):
        """What it prints; SystemExit where it fails."""
        words = [str(word) for word in (model, "-o", out or self.out, "--llama-bin", common.LLAMA_BIN, "--threads",
                                        common.THREADS, *arguments)]
        said = io.StringIO()
        said.reconfigure = lambda **_: None
        with contextlib.redirect_stdout(said), mock.patch("eval.options.drop_output"), \
                mock.patch("eval.options.stop_by_signal"):
            self.assertEqual(fold(words), 0)
        return said.getvalue()

    def check_refused(self, words, model, *arguments, out=None):
        folder = (out or self.out).parent
        before = sorted(folder.iterdir())
        with self.assertRaisesRegex(SystemExit, words):
            self.fold(model, *arguments, out=out)
        self.assertEqual(sorted(folder.iterdir()), before)


class Architectures(Case):
    def test_logits_stay_what_they_are(self):
        for arch in FOLDED:
            with self.subTest(arch), mock.patch("fold.factors.octaves_from_energies", any_factors):
                said = self.fold(common.tiny_model(arch), "--force")
                self.assertRegex(said, r"factors from 2\^-3 to 2\^[23] in")
                found = re.search(r"logits: (?:equal to the last bit|a divergence of (\S+)) in llama.cpp", said)
                print(f"{arch}: {said.splitlines()[-2]}")
                self.assertTrue(0 <= float(found[1] or 0) < 1e-4, said)

    def test_a_norms_weight_takes_them(self):
        with mock.patch("fold.factors.octaves_from_energies", any_factors):
            said = self.fold(common.tiny_model("qwen3"))
        self.assertIn("layer 0: factors from 2^-3 to 2^3 in attn_k_norm.weight, attn_q_norm.weight\n", said)

    def test_layers_that_share_keys_share_their_factors(self):
        model = Model(file.read(common.tiny_model("gemma4")), "gemma4")
        self.assertEqual([(group.layer, len(group.queries)) for group in model.groups()], [(0, 1), (1, 1), (2, 3), (3, 3)])
        model = Model(file.read(common.tiny_model("gemma3n")), "gemma3n")
        self.assertEqual([(group.layer, len(group.queries)) for group in model.groups()][-3:], [(17, 1), (18, 5), (19, 2)])

    def test_lists_do_not_contradict(self):
        lists = [HALVES, NEIGHBOURS, NO_ROPE, set(REFUSED)]
        self.assertEqual(sum(map(len, lists)), len(set().union(*lists)))


class Factors(Case):
    def test_the_model_with_outliers(self):
        said = self.fold(common.tiny_model("qwen2"))
        self.assertEqual([line.partition(":")[0] for line in said.splitlines() if line.startswith("layer")],
                         ["layer 0", "layer 3"], said)
        reader = file.read(self.out)
        self.assertEqual(Model(reader, self.out).get(file.MARK), file.VERSION)

    def test_a_cache_of_4_bits_gains(self):
        """Keys whose channels differ by up to 30 times, which is all that is folded away."""
        base = self.directory / "outliers.gguf"
        make = common.ROOT / "scripts/make_outlier_gguf.py"
        subprocess.run([sys.executable, make, common.tiny_model("llama"), base], check=True)
        self.fold(base)
        divergence = {}
        for path in (base, self.out):
            command = [common.LLAMA_BIN / "llama-perplexity", "-m", path, "-f", TEXT, "-c", 512, "-b", 512, "--chunks", 1, "-t",
                       common.THREADS, "-fa", "on", "-dev", "none", "--kl-divergence-base", self.directory / "logits"]
            self.assert_ok(common.run(command))
            result = with_last_words("Mean    KLD", lambda: common.run([*command, "--kl-divergence", "-ctk", "q4_0"]))
            divergence[path] = float(re.search(r"Mean\s+KLD:\s+(\S+)", result.log)[1])
        print(f"divergence {divergence[self.out]} of {divergence[base]} before")
        self.assertLess(divergence[self.out], 0.5 * divergence[base])

    def test_energies_are_those_of_projected_vectors(self):
        """By definition: vectors of random signs behind the norm, projected."""
        reader = file.read(common.tiny_model("qwen2"))
        model = Model(reader, "qwen2")
        group = model.groups()[0]
        weight, bias, norm = (model.tensors[f"blk.0.attn_{name}"].data.astype(np.float64)
                              for name in ("k.weight", "k.bias", "norm.weight"))
        x = np.random.default_rng(1).choice([-1.0, 1.0], (20000, weight.shape[1])) * norm
        wanted = np.square(x @ weight.T + bias).mean(axis=0)
        self.assertLess(abs(factors.energies(group.keys).ravel() / wanted - 1).max(), 0.1)

    def test_energies_behind_a_norm(self):
        model = Model(file.read(common.tiny_model("qwen3")), "qwen3")
        group = model.groups()[0]
        weight, norm, after = (model.tensors[f"blk.0.attn_{name}"].data.astype(np.float64)
                               for name in ("k.weight", "norm.weight", "k_norm.weight"))
        x = np.random.default_rng(1).choice([-1.0, 1.0], (20000, weight.shape[1])) * norm
        rows = (x @ weight.T).reshape(len(x), -1, 128)
        rows = rows / np.sqrt(np.square(rows).mean(axis=2, keepdims=True)) * after
        self.assertLess(abs(factors.energies(group.keys) / np.square(rows).mean(axis=0) - 1).max(), 0.1)


def random_tensor(kind, n_rows, n_columns, chance):
    """A stand-in for gguf's: blocks of random codes, with scales as models have them."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = chance.integers(0, 256, (n_rows, n_columns // n_values, n_bytes), np.uint8)
    for at in blocks.SCALES.get(kind, ()):
        scales = (chance.standard_normal(data.shape[:2]) * 0.01).astype(np.float16)
        data[:, :, at:at + 2] = scales[..., None].view(np.uint8)
    for at in [blocks.EXPONENTS[kind]] if kind in blocks.EXPONENTS else []:
        data[:, :, at] = chance.integers(115, 125, data.shape[:2])
    return mock.Mock(tensor_type=kind, data=data.reshape(n_rows, -1))


class Blocks(unittest.TestCase):
    def test_rows_are_multiplied_exactly(self):
        chance = np.random.default_rng(1)
        for kind in (*blocks.SCALES, *blocks.EXPONENTS):
            with self.subTest(kind.name):
                tensor = random_tensor(kind, 64, 512, chance)
                low, high = blocks.bounds(tensor, 64)
                self.assertTrue((low <= 0).all() and (high >= 0).all())
                self.assertTrue((low < 0).any() and (high > 3).all(), (low, high))
                for exponents in (low, np.minimum(high, 8), chance.integers(low, np.minimum(high, 8) + 1)):
                    data = blocks.bytes_of(tensor).copy()
                    blocks.multiply(kind, data, exponents)
                    before, after = (gguf.quants.dequantize(rows.reshape(64, -1), kind) for rows in (tensor.data, data))
                    np.testing.assert_array_equal(after, np.ldexp(before, exponents[:, None]))

    def test_bounds_are_the_furthest(self):
        for scale, low, high in ((0.0, -blocks.FREE, blocks.FREE), (1.0, -24, 15), (65504.0, -29, 0), (2.0 ** -14, -10, 29),
                                 (3 * 2.0 ** -24, 0, 38), (1 + 2.0 ** -10, -14, 15)):
            found = blocks.bounds_of_halves(np.array([[scale]], np.float32), False)
            self.assertEqual((found[0][0], found[1][0]), (low, high), scale)

    def test_plain_floats(self):
        x = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
        exponents = np.arange(-4, 4)
        wanted = np.ldexp(x, exponents[:, None])
        for kind, dtype in ((Type.F32, np.float32), (Type.F16, np.float16)):
            data = x.astype(dtype).view(np.uint8).ravel().copy()
            blocks.multiply(kind, data, exponents)
            self.assertLess(abs(data.view(dtype).reshape(x.shape).astype(np.float32) / wanted - 1).max(), 2 ** -10)
        data = (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).ravel().copy()
        blocks.multiply(Type.BF16, data, exponents)
        found = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(x.shape)
        self.assertLess(abs(found / wanted - 1).max(), 2 ** -7)

    def test_other_types_are_refused(self):
        with self.assertRaisesRegex(LlamaError, "of type IQ1_M.*fold a file of this model in F16"):
            blocks.check(mock.Mock(tensor_type=Type.IQ1_M))


class SelfCheck(Case):
    def wrong(self, kind, data, exponents):
        """As blocks.multiply, but for the first row that has a factor."""
        exponents = np.array(exponents)
        exponents[np.flatnonzero(exponents)[:1]] += 1
        blocks.multiply(kind, data, exponents)

    def test_a_wrong_factor_fails_by_weights(self):
        with mock.patch("fold.file.multiply", self.wrong):
            for arguments in ((), ("--check", "weights")):
                self.check_refused("is not equal to the old one: row .* It was deleted", common.tiny_model("qwen2"), *arguments)

    def test_a_wrong_factor_fails_by_logits(self):
        with mock.patch("fold.file.multiply", self.wrong), mock.patch("fold.check.compare_weights", return_value=0):
            self.check_refused("its logits have a divergence of .* It was deleted", common.tiny_model("qwen2"))

    def test_channels_that_do_not_turn_together_fail_by_logits(self):
        """What no look at rows could tell: the architecture understood wrongly."""
        with mock.patch("fold.factors.octaves_from_energies", any_factors), \
                mock.patch("fold.layers.HALVES", HALVES - {"qwen2"}), \
                mock.patch("fold.layers.NEIGHBOURS", NEIGHBOURS | {"qwen2"}):
            self.check_refused("its logits have a divergence of .* It was deleted", common.tiny_model("qwen2"))

    def test_another_tensor_that_changes_fails(self):
        write = file.write

        def spoil(reader, path, changes, tick):
            write(reader, path, changes, tick)
            with open(path, "r+b") as new:
                new.seek(reader.tensors[0].data_offset + 100)
                new.write(b"\x55" * 64)

        with mock.patch("fold.file.write", spoil):
            self.check_refused("is not what it was", common.tiny_model("qwen2"))

    def test_logits_that_llama_cpp_wrote(self):
        """As llama-perplexity writes them: a window's tokens, then rows of a step, a least one, and multiples."""
        path = self.directory / "logits"
        rows = struct.pack("<ff3Hxx", 0.5, -4.0, 0, 2, 8) + struct.pack("<ff3Hxx", 1.0, -1.0, 1, 0, 0)
        path.write_bytes(struct.pack("<8sIII2I", b"_logits_", 2, 3, 1, 7, 8) + rows)
        np.testing.assert_array_equal(check.read_logits(path), [[-4, -3, 0], [0, -1, -1]])


class Refusals(Case):
    def test_what_is_not_understood(self):
        self.check_refused("architecture deepseek2 keeps one latent .*the plug-in", common.tiny_model("deepseek2"))
        path = self.directory / "unknown.gguf"
        self.addCleanup(path.unlink)
        path.write_bytes(common.tiny_model("qwen2").read_bytes().replace(b"qwen2", b"qwenX"))
        self.check_refused("architecture qwenX is not understood", path)

    def test_nothing_to_do(self):
        self.check_refused("nothing to fold", common.tiny_model("llama"))
        self.fold(common.tiny_model("qwen2"))
        self.check_refused("is folded already", self.out, out=self.directory / "again.gguf")

    def test_files(self):
        qwen2 = common.tiny_model("qwen2")
        self.check_refused("not a file", self.directory / "absent.gguf")
        with self.assertRaisesRegex(SystemExit, "there is no folder"):
            self.fold(qwen2, out=self.directory / "absent/out.gguf")
        self.out.write_text("mine")
        self.check_refused("exists; name another file, or write over it by --force", qwen2)
        self.assertEqual(self.out.read_text(), "mine")
        self.assertIn("logits: ", self.fold(qwen2, "--force"))
        copy = self.directory / "copy.gguf"
        self.addCleanup(copy.unlink)
        shutil.copy(qwen2, copy)
        self.check_refused("which is read", copy, out=copy)
        content = qwen2.read_bytes()
        for n in (0, 3, 20, 1000, len(content) - 40):
            copy.write_bytes(content[:n])
            self.check_refused("fetch it again", copy, out=self.directory / "new.gguf")

    def test_a_folder_that_is_read_only(self):
        """One that is to root, too."""
        with self.assertRaisesRegex(SystemExit, "-o: /proc/out.gguf cannot be written"):
            self.fold(common.tiny_model("qwen2"), out=pathlib.Path("/proc/out.gguf"))

    def test_without_llama_cpp(self):
        qwen2 = common.tiny_model("qwen2")
        with mock.patch("fold.__main__.find_llama_bin", side_effect=LlamaError("not found")):
            with self.assertRaisesRegex(SystemExit, "not found"):
                self.fold(qwen2)
        said = self.fold(qwen2, "--check", "weights")
        self.assertNotIn("logits", said)

    def test_the_command(self):
        done = subprocess.run([TQ, "fold", common.tiny_model("qwen2"), "-o", self.out, "--llama-bin", common.LLAMA_BIN],
                              capture_output=True, text=True, env={**os.environ, "TQ_PYTHON": sys.executable})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("layer 0: factors from 2^-1 to 2^1 in attn_k.weight, attn_k.bias, attn_q.weight, attn_q.bias\n",
                      done.stdout)
        self.assertIn(f"{self.out}: {self.out.stat().st_size} bytes", done.stdout)


if __name__ == "__main__":
    common.main()
