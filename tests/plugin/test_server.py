# SPDX-License-Identifier: MIT
"""Stock llama-server with the plug-in: parallel requests, and its slots saved and restored."""
import concurrent.futures
import dataclasses
import itertools
import math
import random

from common import PLAIN, SETUP, TestCase, main, path_from_env, tiny_model, under_test
from eval.llama import F16, Cache, running_server

TEXT = path_from_env("TQ_TEXT").read_text()
N_CHARACTERS = 800  # some 190 tokens, of which TQ4 codes those between the first 4 and the last 64
N_LIKELIEST = 20
N_TOLD = 100  # of the other replies: more than may have become less likely than their 100th

# What a restored slot may differ by, of what the coding of its tokens moves: two codings of the same values that have nothing
# to do with each other differ by the root of two times as much as each of them from the values.
TWO_CODINGS = math.sqrt(2)


def prompts(n):
    return [TEXT[20000 + 5000 * i:][:N_CHARACTERS] for i in range(n)]


class Slots:
    """A server, whose slot 0 answers each prompt twice, and slot 1 once, with what slot 0 saved."""

    def __init__(self, server):
        self.server = server

    def complete(self, prompt, slot=-1, n=1):
        return self.server.post("/completion", prompt=prompt, n_predict=n, temperature=0, id_slot=slot, cache_prompt=True,
                                n_probs=N_TOLD)

    def next_token(self, prompt, slot):
        """Logarithms of the likeliest tokens' probabilities."""
        reply = self.complete(prompt, slot)
        self.n_read = reply["timings"]["prompt_n"]
        return {token["id"]: token["logprob"] for token in reply["completion_probabilities"][0]["top_logprobs"]}

    def restore(self, prompt, slot=0):
        """(next token of the slot that was saved, of the next one, that was restored, number of tokens in the file)"""
        self.next_token(prompt, slot)
        saved = self.server.post(f"/slots/{slot}?action=save", filename="slot.bin")["n_saved"]
        again = self.next_token(prompt, slot)
        restored = self.server.post(f"/slots/{slot + 1}?action=restore", filename="slot.bin")["n_restored"]
        assert restored == saved
        other = self.next_token(prompt, slot + 1)
        assert self.n_read < 10, "all but the last token of the prompt come from the file"
        return again, other, saved


def square(one, two, reference):
    """Mean square of the difference of two replies, over the reference's likeliest tokens."""
    tokens = sorted(reference, key=reference.get)[-N_LIKELIEST:]
    least = min(*one.values(), *two.values())
    return sum((one.get(token, least) - two.get(token, least)) ** 2 for token in tokens) / N_LIKELIEST


def root_mean(squares):
    return math.sqrt(sum(squares) / len(squares))


class ServerCase(TestCase):
    options = ""  # of the plug-in
    arguments = ()

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.slots = cls.start(Cache(f"TQ4:{cls.options}"), "-lv", "4", *cls.arguments)

    @classmethod
    def start(cls, cache, *arguments):
        arguments = ["-c", "3072", "-np", "3", "--slots", "--slot-save-path", cls.directory, *arguments]
        context = running_server(SETUP, cache, arguments)
        slots = Slots(context.__enter__())
        cls.addClassCleanup(context.__exit__, None, None, None)
        return slots


class Server(ServerCase):
    """Without quantization: a restored slot is the saved one."""

    options = PLAIN

    def test_the_device_holds_the_cache(self):
        self.assertIn("turboquant: TQ4 holds the KV cache", under_test(self.slots.server.read_log()))

    def test_parallel_requests(self):
        questions = ["The capital of France is", "Two and two are", "The sun rises in the", "Water boils at"] * 2
        with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
            answers = list(pool.map(lambda question: self.slots.complete(question, n=16)["content"], questions))
        self.assertIn("Paris", answers[0])
        self.assertTrue(all(answers))
        self.assertNotIn("E turboquant", self.slots.server.read_log())

    def test_a_slot_is_saved_and_restored_into_another(self):
        # The same values at the same places of a stream, so the same sums; the JSON has six digits.
        for prompt in prompts(2):
            again, other, n_saved = self.slots.restore(prompt)
            self.assertGreater(n_saved, 100)
            self.assertLess(root_mean([square(again, other, again)]), 1e-5)


class CodedServer(ServerCase):
    """
    With quantization a slot that is restored into an empty one gets the codes and references that it had.
    """

    arguments = ("-np", "12")
    n_prompts = 6
    bound = .5

    def test_what_restoring_moves(self):
        stock = self.start(F16)
        first, second = [], []
        for i, prompt in enumerate(prompts(self.n_prompts)):
            exact = stock.next_token(prompt, 0)
            again, other, _ = self.slots.restore(prompt, 2 * i)
            first.append(square(exact, again, exact))
            second.append(square(again, other, exact))
        print(f"coding moves {root_mean(first):.4f}, restoring {root_mean(second):.4f}: "
              f"{root_mean(second) / root_mean(first):.3f} of it")
        self.assertLess(root_mean(second), self.bound * root_mean(first))


class UnifiedServer(CodedServer):
    """Slots share the cells. One that is restored into others is added up in another order."""

    options = "ref=0,sequences=12"
    arguments = ("-kvu", *CodedServer.arguments)
    bound = TWO_CODINGS


class DamagedServer(ServerCase):
    """A slot's file with one value that is not a number: who uses that slot's tokens gets no numbers, until they are gone."""

    arguments = ("--cache-ram", "0")  # the server would keep the damaged tokens for others, as it does with its own caches

    def gets_numbers(self, prompt, slot):
        return None not in self.slots.next_token(prompt, slot).values()

    def restore_damaged(self, prompt, slot):
        self.slots.complete(prompt, 0)
        self.slots.server.post("/slots/0?action=save", filename="whole.bin")
        data = bytearray((self.directory / "whole.bin").read_bytes())
        middle = len(data) // 4 * 2
        data[middle:middle + 2] = b"\x00\x7e"
        (self.directory / "damaged.bin").write_bytes(data)
        self.slots.server.post(f"/slots/{slot}?action=restore", filename="damaged.bin")

    def test_only_who_uses_the_tokens_gets_none_until_they_are_gone(self):
        prompt, other = prompts(2)
        for name, action in {"erased": "erase", "restored": "restore"}.items():
            with self.subTest(name):
                self.restore_damaged(prompt, 1)
                self.assertFalse(self.gets_numbers(prompt + " and", 1))
                self.assertTrue(self.gets_numbers(other, 0))
                self.assertTrue(self.gets_numbers(other, 2))
                self.slots.server.post(f"/slots/1?action={action}", filename="whole.bin")
                self.assertTrue(self.gets_numbers(prompt + " and", 1))
        self.assertIn("Erase the sequence", self.slots.server.read_log())

    def test_another_prompt_overwrites_them(self):
        prompt, other = prompts(2)
        self.restore_damaged(prompt, 1)
        self.assertTrue(self.gets_numbers(other, 1))

    def test_requests_at_the_same_time_are_answered(self):
        """The damaged slot's tokens and theirs are in one batch."""
        prompt, other = prompts(2)
        self.restore_damaged(prompt, 1)
        asked = [(other, 2), (prompt + " and", 1), (other, 0)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            replies = list(pool.map(lambda text_and_slot: self.slots.complete(*text_and_slot, n=16), asked))
        have_numbers = [all(token["logprob"] is not None for token in reply["completion_probabilities"]) for reply in replies]
        self.assertEqual(have_numbers, [True, False, True])


class DamagedUnifiedServer(DamagedServer):
    """The same where slots share the cells."""

    arguments = ("-kvu", *DamagedServer.arguments)


class FirstRequest(ServerCase):
    """Whatever a slot is asked first, later requests are answered as by a fresh one."""

    arguments = ("--cache-ram", "0")  # the server would take a prompt that another slot has read from there, coded twice

    def test_a_slot_answers_as_a_fresh_one(self):
        """References go with the tokens that were written over, so the answer is the same to the last digit."""
        prompt, other = prompts(2)
        wanted = self.slots.next_token(prompt, 0)
        for first in (other, "|  0 |  0 |\n" * 40, " the" * 150, " the of" * 75, " the" * 90 + other):
            with self.subTest(first[:20]):
                self.slots.next_token(first, 1)
                self.assertEqual(self.slots.next_token(prompt, 1), wanted)


class GoingOn(ServerCase):
    """A slot's prompt grows after another slot's came behind it, whose first tokens take back what its own places were lent."""

    options = "k=sq8,v=sq8"
    arguments = ("-kvu", "--cache-ram", "0")

    def grow(self, prompt, other=None):
        for slot in range(2):
            self.slots.server.post(f"/slots/{slot}?action=erase")
        self.slots.next_token(prompt[:200], 0)
        if other:
            self.slots.next_token(other, 1)
        return self.slots.next_token(prompt, 0)

    def test_others_do_not_move_it(self):
        stock = self.start(F16, *self.arguments)
        by_itself, behind = [], []
        for prompt, other in itertools.pairwise(prompts(5)):
            exact = stock.next_token(prompt, 0)
            by_itself.append(square(exact, self.grow(prompt), exact))
            behind.append(square(exact, self.grow(prompt, other), exact))
        print(f"coding moves {root_mean(by_itself):.4f}, others as well {root_mean(behind):.4f}")
        self.assertLess(root_mean(behind), TWO_CODINGS * root_mean(by_itself))


class FirstTokens(TestCase):
    """
    Slots that share the cells keep their first tokens exact. A slot's file has what the cache holds of it, layer by layer. What
    the first layer's keys are before they are coded depends on nothing else, so where the file begins to differ from that of an
    FP16 cache tells how many tokens are exact.
    """

    n_tokens = 150
    n_sinks = 4

    def save(self, server, slot):
        server.post(f"/slots/{slot}?action=save", filename="slot.bin")
        return (self.directory / "slot.bin").read_bytes()

    def ask(self, server, slot, seed, n=n_tokens):
        chance = random.Random(seed)
        prompt = [chance.randrange(3, 200) for _ in range(n)]
        server.post("/completion", prompt=prompt, n_predict=1, id_slot=slot, cache_prompt=False)
        return self.save(server, slot)

    def serve(self, cache):
        # Repacked weights have other sums, and not all devices take them.
        arguments = ("-c", "4096", "-np", "7", "-kvu", "--no-repack", "--slots", "--cache-ram", "0", "--slot-save-path",
                     self.directory)
        return running_server(dataclasses.replace(SETUP, model=self.model), cache, arguments)

    def start(self, arch):
        self.model = tiny_model(arch)
        with self.serve(F16) as server:
            self.stock = [self.ask(server, slot, slot) for slot in range(7)]
        with self.serve(Cache("TQ4:sequences=0")) as server:
            exact, coded = (self.differs_at(self.ask(server, slot, slot), slot) for slot in range(2))
        self.row = (exact - coded) // self.n_sinks
        self.assertGreater(self.row, 100)
        self.coded = coded // self.row

    def differs_at(self, ours, slot):
        self.assertEqual(len(ours), len(self.stock[slot]))
        return next(i for i, pair in enumerate(zip(ours, self.stock[slot])) if pair[0] != pair[1])

    def n_exact(self, ours, slot):
        return self.differs_at(ours, slot) // self.row - self.coded

    def test_as_many_sequences_as_there_are_places_for(self):
        self.start("llama")
        with self.serve(Cache("TQ4")) as server:
            for slot in range(7):
                self.ask(server, slot, slot)
            found = [self.n_exact(self.save(server, slot), slot) for slot in range(7)]
            self.assertEqual(found, [self.n_sinks] * 5 + [0] * 2)
            # Who has a place keeps it, whatever others do; who comes where one began gets its place.
            self.ask(server, 6, 100, 700)
            self.assertEqual([self.n_exact(self.save(server, slot), slot) for slot in range(5)], [self.n_sinks] * 5)
            self.assertEqual(self.n_exact(self.ask(server, 3, 3), 3), self.n_sinks)
            server.post("/slots/2?action=erase")
            self.assertEqual(self.n_exact(self.ask(server, 5, 5), 5), self.n_sinks)
            # Its file was the last that was saved.
            server.post("/slots/5?action=erase")
            server.post("/slots/5?action=restore", filename="slot.bin")
            self.assertEqual(self.n_exact(self.save(server, 5), 5), self.n_sinks)

    def test_masks_with_alibi(self):
        self.start("mpt")
        with self.serve(Cache("TQ4")) as server:
            self.assertEqual([self.n_exact(self.ask(server, slot, slot), slot) for slot in range(3)], [self.n_sinks] * 3)


if __name__ == "__main__":
    main()
