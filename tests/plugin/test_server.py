# SPDX-License-Identifier: MIT
"""Stock llama-server with the plug-in: parallel requests, and its slots saved and restored."""
import concurrent.futures
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

from common import LLAMA_BIN, MODEL, THREADS, TestCase, environment, main

PROMPT = "Here is the beginning of a story. Once upon a time there was an old king who lived in a castle by the sea, and " * 4


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server(TestCase):
    arguments = ()
    options = "ref=0,balance=off"  # so that a restored slot is the saved one to the bit, but for a trellis vector in thousands
    restored_tolerance = 0.02  # of the logarithms of the likeliest tokens' probabilities

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.port = free_port()
        cls.log = open(cls.directory / "log", "w+b")
        cls.addClassCleanup(cls.log.close)
        command = [LLAMA_BIN / "llama-server", "-m", MODEL, "-dev", "TQ4", "-ngl", "99", "-t", THREADS, "-c", "4096"]
        command += ["-np", "3", "-lv", "4", "--host", "127.0.0.1", "--port", cls.port, "--slots"]
        command += ["--slot-save-path", cls.directory, *cls.arguments]
        cls.server = subprocess.Popen([str(c) for c in command], stdout=cls.log, stderr=cls.log, stdin=subprocess.DEVNULL,
                                      env=environment(TQ_GGML=cls.options))
        cls.addClassCleanup(cls.stop)
        for _ in range(600):
            try:
                if cls.get("/health")["status"] == "ok":
                    return
            except (OSError, urllib.error.URLError):
                pass
            if cls.server.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError("the server does not start:\n" + cls.read_log()[-4000:])

    @classmethod
    def stop(cls):
        cls.server.terminate()
        cls.server.wait(60)

    @classmethod
    def read_log(cls):
        return (cls.directory / "log").read_text(errors="replace")

    @classmethod
    def get(cls, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{cls.port}{path}", timeout=60) as reply:
            return json.load(reply)

    @classmethod
    def post(cls, path, **body):
        request = urllib.request.Request(f"http://127.0.0.1:{cls.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    def complete(self, prompt, slot=-1, n=16):
        return self.post("/completion", prompt=prompt, n_predict=n, temperature=0, id_slot=slot, cache_prompt=True, n_probs=20)

    def assert_same_next_token(self, reply, other, tolerance):
        """Of the tokens that come first: the five likeliest of one reply have nearly that probability in the other."""
        one, two = ({token["id"]: token["logprob"] for token in r["completion_probabilities"][0]["top_logprobs"]}
                    for r in (reply, other))
        for token in sorted(one, key=one.get)[-5:]:
            self.assertLessEqual(abs(one[token] - two.get(token, float("-inf"))), tolerance, f"token {token}: {one} and {two}")

    def test_the_device_holds_the_cache(self):
        self.assertIn("turboquant: TQ4 holds the KV cache", self.read_log())

    def test_parallel_requests(self):
        questions = ["The capital of France is", "Two and two are", "The sun rises in the", "Water boils at"] * 2
        with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
            answers = list(pool.map(lambda q: self.complete(q)["content"], questions))
        self.assertIn("Paris", answers[0])
        self.assertTrue(all(answers))
        self.assertNotIn("E turboquant", self.read_log())

    def test_a_slot_is_saved_and_restored_into_another(self):
        first = self.complete(PROMPT, slot=0)
        saved = self.post("/slots/0?action=save", filename="slot.bin")
        self.assertGreater(saved["n_saved"], 80)
        again = self.complete(PROMPT, slot=0)
        restored = self.post("/slots/1?action=restore", filename="slot.bin")
        self.assertEqual(restored["n_restored"], saved["n_saved"])
        other = self.complete(PROMPT, slot=1)
        self.assert_same_next_token(first, again, 0.5)
        self.assert_same_next_token(again, other, self.restored_tolerance)
        # All but the last token of the prompt came from the file.
        self.assertLess(other["timings"]["prompt_n"], 10)


class UnifiedServer(Server):
    """Slots share the cells. One that is restored into others is added up in another order, which an f16 cache shows, too."""

    arguments = ("-kvu",)
    restored_tolerance = 0.5


if __name__ == "__main__":
    main()
