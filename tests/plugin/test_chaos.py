# SPDX-License-Identifier: MIT
"""
llama-server under clients that do as they please: abort, erase, save and restore slots, some of them from damaged files.

Environment, besides common.py's: TQ_CHAOS_SECONDS (20), how long; TQ_CHAOS_SEED (1).
"""
import json
import math
import os
import random
import socket
import statistics
import threading
import time

from common import SETUP, TestCase, main, path_from_env
from eval.llama import F16, Cache, LlamaError, running_server

SECONDS = float(os.environ.get("TQ_CHAOS_SECONDS", "20"))
SEED = int(os.environ.get("TQ_CHAOS_SEED", "1"))
TEXT = path_from_env("TQ_TEXT").read_text()
N_SLOTS = 4
N_LIKELIEST = 100
FIXED_PROMPTS = [TEXT[at:at + n] for at in range(150000, 450000, 50000) for n in (800, 1200)]
# Requests that nobody should have sent first, or ever.
ODD_PROMPTS = (" the" * 200, "a", "{\"x\": 0}, " * 60, "\n" * 150, "0123456789" * 40)


class Client(threading.Thread):
    """Uses one slot. What it restores damaged it may be answered anything for, until it has erased it."""

    def __init__(self, server, folder, slot, end):
        super().__init__(daemon=True)
        self.server, self.folder, self.slot, self.end = server, folder, slot, end
        self.random = random.Random(SEED * N_SLOTS + slot)
        self.file = f"slot{slot}.bin"
        self.n_requests = self.n_damaged = 0
        self.faults = []
        self.prompt, self.is_damaged = "", False

    def run(self):
        actions = {self.ask_anew: 4, self.ask_on: 4, self.abort: 2, self.erase: 1, self.save_and_restore: 2, self.damage: 1}
        while time.monotonic() < self.end:
            action = self.random.choices(list(actions), actions.values())[0]
            try:
                action()
            except Exception as error:
                self.faults.append(f"slot {self.slot}, {action.__name__}: {error!r}")
                if "died" in str(error):
                    break

    def text(self):
        at = self.random.randrange(len(TEXT) // 2)
        return TEXT[at:at + self.random.choice((40, 400, 1500))]

    def body(self, **more):
        return {"prompt": self.prompt, "n_predict": self.random.choice((1, 8, 40)), "id_slot": self.slot, "n_probs": 1,
                "cache_prompt": True, "temperature": self.random.choice((0, 1)), **more}

    def ask(self):
        self.n_requests += 1
        reply = self.server.post("/completion", **self.body())
        if not self.is_damaged and any(token["logprob"] is None for token in reply["completion_probabilities"]):
            self.faults.append(f"slot {self.slot} got NaN for {self.prompt[:40]!r}")
        self.prompt += reply["content"]

    def ask_anew(self):
        if self.is_damaged:
            self.erase()
        self.prompt = self.random.choice(ODD_PROMPTS) if self.random.random() < 0.2 else self.text()
        self.ask()

    def ask_on(self):
        self.prompt = (self.prompt + " " + self.text())[:2500]
        self.ask()

    def abort(self):
        """A stream that nobody reads to its end."""
        body = json.dumps(self.body(stream=True, n_predict=200)).encode()
        with socket.create_connection(("127.0.0.1", self.server.port)) as connection:
            connection.sendall(b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n" % len(body) + body)
            connection.settimeout(self.random.random())
            try:
                connection.recv(100)
            except TimeoutError:
                pass

    def slot_action(self, action, file=None):
        return self.server.post(f"/slots/{self.slot}?action={action}", **({"filename": file} if file else {}))

    def erase(self):
        self.slot_action("erase")
        self.prompt, self.is_damaged = "", False

    def save_and_restore(self):
        if self.is_damaged:
            self.erase()
        self.ask_anew()
        if self.slot_action("save", self.file)["n_saved"] > 0:
            self.slot_action("restore", self.file)

    def damage(self):
        """NaN, infinity, other bytes. Not a file that is cut: llama.cpp aborts at one, also with its own caches."""
        self.save_and_restore()
        data = bytearray((self.folder / self.file).read_bytes())
        kind = self.random.choice(("nan", "infinity", "noise"))
        places = [self.random.randrange(len(data) // 4, len(data)) // 2 * 2 for _ in range(self.random.choice((1, 50)))]
        for at in places:
            data[at:at + 2] = {"nan": b"\x00\x7e", "infinity": b"\x00\x7c"}.get(kind, self.random.randbytes(2))
        (self.folder / ("damaged" + self.file)).write_bytes(data)
        self.is_damaged = True
        self.n_damaged += 1
        try:
            self.slot_action("restore", "damaged" + self.file)
            self.ask_on()
        except LlamaError as error:
            if "died" in str(error):
                raise
        finally:
            self.erase()


def distribution(server, prompt):
    reply = server.post("/completion", prompt=prompt, n_predict=1, temperature=0, id_slot=0, cache_prompt=False,
                        n_probs=N_LIKELIEST)
    return {token["id"]: token["logprob"] for token in reply["completion_probabilities"][0]["top_logprobs"]}


def divergence(exact, found):
    """KL over the exact distribution's likeliest tokens, all others as one."""
    least = min(found.values())
    pairs = [(math.exp(logprob), math.exp(found.get(token, least))) for token, logprob in exact.items()]
    p_rest, q_rest = (max(1 - sum(side), 1e-6) for side in zip(*pairs))
    return sum(p * math.log(p / q) for p, q in [*pairs, (p_rest, q_rest)])


class Chaos(TestCase):
    # With --cache-ram llama.cpp would keep the tokens of damaged slots and give them to others, as it does with its own caches.
    arguments = ("-c", str(N_SLOTS * 1024), "-np", str(N_SLOTS), "--slots", "--cache-ram", "0")
    # Characters of the prompt that another slot of a fresh server has had before, a server for each.
    fresh = (0,)

    def server(self, cache):
        context = running_server(SETUP, cache, [*self.arguments, "--slot-save-path", self.directory])
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def answers(self, server):
        return [distribution(server, prompt) for prompt in FIXED_PROMPTS]

    def answers_of_fresh(self, n_before):
        server = self.server(Cache("TQ4"))
        if n_before > 0:
            server.post("/completion", prompt=TEXT[:n_before], n_predict=1, id_slot=1, cache_prompt=True)
        return self.answers(server)

    def test_only_damaged_slots_are_hurt_and_later_answers_are_as_good(self):
        exact = self.answers(self.server(F16))
        fresh = [self.answers_of_fresh(n) for n in self.fresh]
        server = self.server(Cache("TQ4"))
        clients = [Client(server, self.directory, slot, time.monotonic() + SECONDS) for slot in range(N_SLOTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(SECONDS + 300)
        self.assertFalse([client.slot for client in clients if client.is_alive()], "a client waits without end")
        faults = [fault for client in clients for fault in client.faults]
        self.assertEqual(faults, [], server.read_log()[-4000:] if faults else "")
        later = self.answers(server)
        *before, after = (statistics.mean(map(divergence, exact, found)) for found in (*fresh, later))
        of_fresh = ", ".join(f"{kl:.5f}" for kl in before)
        print(f"{sum(client.n_requests for client in clients)} requests, {sum(client.n_damaged for client in clients)} damaged "
              f"files in {SECONDS:.0f} s; KL {of_fresh} on fresh servers, {after:.5f} afterwards")
        self.assertLess(after, 1.2 * max(before))
        for client in clients:
            client.erase()
        erased = statistics.mean(map(divergence, exact, self.answers(server)))
        print(f"KL {erased:.5f} with all slots erased")
        self.assertLess(erased, 1.2 * before[0])


class UnifiedChaos(Chaos):
    """Slots share the cells. They keep their first tokens exact wherever these are, but share blocks: docs/llama-cpp.md."""

    arguments = (*Chaos.arguments, "-kvu")
    fresh = (0, 40, 200, 1500)


if __name__ == "__main__":
    main()
