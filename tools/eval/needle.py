# SPDX-License-Identifier: MIT
"""
Needle in a haystack: sentences with a secret number, hidden in a long text at some depth, are asked for at its end. An answer
scores the share of the asked-for numbers that it holds. Small models miss some with any cache, so FP16 stands beside each.
"""
import random
from dataclasses import dataclass
from pathlib import Path

from .llama import Cache, running_server

CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Lagos", "Riga", "Sofia", "Turin", "Basel", "Porto", "Osaka")
N_MULTI = 3
ANSWER_TOKENS = 40
CHARACTERS_PER_TOKEN = 6  # more than any text has: the haystack is cut by tokens
MARGIN_TOKENS = 160  # question, needles and the chat template


@dataclass(frozen=True)
class Needles:
    """One measurement: a server on one cache, asked about every length and depth."""
    cache: Cache
    text: Path
    lengths: tuple
    n_depths: int
    seed: int = 1

    @property
    def name(self):
        return self.cache.name

    @property
    def tokens(self):
        return sum(self.lengths) * (self.n_depths + 1)


def hide(haystack, needles, depths):
    """Put each needle after the sentence that is nearest behind its depth (0 to 1)."""
    for needle, depth in sorted(zip(needles, depths), key=lambda pair: -pair[1]):
        at = int(depth * len(haystack))
        end = haystack.find(". ", at)
        at = end + 2 if 0 <= end < at + 2000 and depth < 1 else at
        haystack = haystack[:at] + needle + " " + haystack[at:]
    return haystack


def make_case(seed, length, depth, n_needles):
    """(cities, numbers) of one cell, the same for all caches."""
    chance = random.Random(f"{seed} {length} {depth} {n_needles}")
    return chance.sample(CITIES, n_needles), [str(chance.randrange(10000, 99999)) for _ in range(n_needles)]


def ask(server, haystack, cities):
    asked = cities[0] if len(cities) == 1 else ", ".join(cities[:-1]) + " and " + cities[-1]
    plural = "s" if len(cities) > 1 else ""
    question = f"What {'are' if plural else 'is'} the secret number{plural} of {asked} that the text tells?"
    content = f"{haystack}\n\n{question} Answer with the number{plural}."
    reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], temperature=0,
                        max_tokens=ANSWER_TOKENS, seed=1, cache_prompt=False)
    return reply["choices"][0]["message"]["content"]


def run_cell(server, text_tokens, needles, length, depth, n_needles):
    cities, numbers = make_case(needles.seed, length, depth, n_needles)
    haystack = server.post("/detokenize", tokens=text_tokens[:length - MARGIN_TOKENS])["content"]
    depths = [depth] if n_needles == 1 else [(i + 0.5) / n_needles for i in range(n_needles)]
    sentences = [f"The secret number of {city} is {number}." for city, number in zip(cities, numbers)]
    answer = ask(server, hide(haystack, sentences, depths), cities)
    return {"length": length, "depth": depth, "n_needles": n_needles, "answer": answer,
            "score": sum(number in answer for number in numbers) / n_needles}


def measure(setup, needles, tick):
    """
    The scores of all cells: single needles at each depth, and one cell of several for each length. tick(tokens) after each.
    """
    depths = [i / max(needles.n_depths - 1, 1) for i in range(needles.n_depths)]
    n_ctx = max(needles.lengths) + ANSWER_TOKENS + 64
    with running_server(setup, needles.cache, ["-c", str(n_ctx), "-np", "1"]) as server:
        content = needles.text.read_text(encoding="utf-8", errors="replace")[:CHARACTERS_PER_TOKEN * max(needles.lengths)]
        tokens = server.post("/tokenize", content=content)["tokens"]
        cells = []
        for length in needles.lengths:
            for depth, n in [*((depth, 1) for depth in depths), (0.5, N_MULTI)]:
                cells.append(run_cell(server, tokens, needles, length, depth, n))
                tick(length)
        return {"cells": cells, "command": server.command}


def shares(cells, reference):
    """(share found, share of those that the reference found), single needles alone."""
    pairs = [(cell["score"], other["score"]) for cell, other in zip(cells, reference) if cell["n_needles"] == 1]
    found = sum(score for score, _ in pairs) / len(pairs)
    known = [score for score, other in pairs if other == 1]
    return found, sum(known) / len(known) if known else None
