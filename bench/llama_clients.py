# SPDX-License-Identifier: MIT
"""Clients that ask one llama-server at once, and whether each got the answer to its own question."""
import http.client
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from eval.llama import LlamaError  # noqa: E402

CANARY_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
CANARY_LENGTH = 8  # so that no text has one by chance
SHORTEST = 200


@dataclass(frozen=True)
class Prompt:
    """A text with a password at its front, which the model is asked for. Nobody else's answer may have it."""
    text: str
    canary: str


def make_prompts(text, n, most_characters, seed):
    """Prompts of all lengths, since slots are then at different places of the cache."""
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        canary = "".join(chance.choices(CANARY_LETTERS, k=CANARY_LENGTH))
        length = chance.randint(min(SHORTEST, most_characters), most_characters)
        at = chance.randrange(max(1, len(text) - length))
        found.append(Prompt(f"The password is {canary}.\n{text[at:at + length]}\nThe password is", canary))
    return found


def ask_all(server, prompts, n_clients, n_predict):
    """
    (replies in the order of prompts, seconds). The reply to a request that failed is the exception; it is raised if all failed,
    or the server died.
    """
    def ask(prompt):
        try:
            return server.post("/completion", prompt=prompt.text, n_predict=n_predict, temperature=0, cache_prompt=True)
        except (LlamaError, http.client.HTTPException, ValueError) as error:
            return error

    begin = time.monotonic()
    with ThreadPoolExecutor(n_clients) as pool:
        replies = list(pool.map(ask, prompts))
    failures = failures_of(replies)
    fatal = failures if len(failures) == len(replies) else [error for error in failures if "died" in str(error)]
    if fatal:
        raise fatal[0]
    return replies, time.monotonic() - begin


def failures_of(replies):
    return [reply for reply in replies if not isinstance(reply, dict)]


def answers(replies):
    """Texts; None of requests that failed."""
    return [reply["content"] if isinstance(reply, dict) else None for reply in replies]


def traffic(prompts, replies, seconds):
    """What can be said of replies without others to compare them with."""
    texts = answers(replies)
    n_tok = sum(reply["tokens_predicted"] for reply in replies if isinstance(reply, dict))
    of_others = sum(other.canary in text for prompt, text in zip(prompts, texts) if text for other in prompts
                    if other is not prompt)
    own = sum(prompt.canary in text for prompt, text in zip(prompts, texts) if text)
    return {"requests": len(replies), "failed_requests": len(failures_of(replies)), "tokens_per_s": n_tok / seconds,
            "passwords_of_others": of_others, "own_passwords": own}


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def agreement(texts, reference):
    """
    How many answers are the reference's, and which part of its text they have before they differ. Greedy answers are not
    always equal even with one cache: what else is in a batch changes the order of additions.
    """
    pairs = [(text, wanted) for text, wanted in zip(texts, reference) if text is not None and wanted]
    if not pairs:
        return {}
    parts = [common_prefix(*pair) / len(pair[1]) for pair in pairs]
    return {"compared": len(pairs), "same_answers": sum(text == wanted for text, wanted in pairs),
            "same_part": sum(parts) / len(parts)}


def resident_mib(pid):
    """Of a process, in host memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE).group(1)) / 1024
