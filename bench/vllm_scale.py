#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
A prediction, not a measurement: time of a decode step of large models under tensor parallelism in vLLM, from the bytes that
each card reads and what it tells the others. docs/vllm.md, "Tensor parallel 4 and 8", says where the rates come from.
"""
import argparse

# layers, hidden size, KV heads, head_dim, parameters; weights of one byte each
MODELS = {"Qwen2.5-72B": (80, 8192, 8, 128, 72.7e9), "Llama-3.1-405B": (126, 16384, 8, 128, 405.9e9)}
# bits a value that attention reads, and bytes a second at which it does
CACHES = {"BF16": (16, 4.4e12), "fp8": (8, 3.0e12), "TQ4": (4.125, 2.9e12), "TQ3": (3.125, 2.9e12)}
WEIGHTS_RATE = 4.4e12
LINK_RATE, LINK_SECONDS = 450e9, 15e-6  # of one card; of an all-reduce, however little it carries
CARD_BYTES = 0.9 * 141e9
SHAPES = ((8, 131072), (64, 32768), (256, 8192))


def step(model, n_cards, cache, n_requests, n_tokens):
    """Requests that a card's memory lets run at once, of n_requests, and the seconds of a step of those."""
    n_layer, n_hidden, n_head_kv, head_dim, n_weights = MODELS[model]
    bits, rate = CACHES[cache]
    of_request = n_tokens * n_layer * max(n_head_kv / n_cards, 1) * head_dim * 2 * bits / 8
    weights = n_weights / n_cards
    n_running = max(min(n_requests, int((CARD_BYTES - weights) // of_request)), 0)
    told = 2 * n_layer * (LINK_SECONDS + n_running * n_hidden * 2 * 2 * (n_cards - 1) / n_cards / LINK_RATE)
    return n_running, weights / WEIGHTS_RATE + n_running * of_request / rate + told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    print("model,cards,requests,tokens,cache,running,ms_a_step,tokens_a_second")
    for model in MODELS:
        for n_cards in args.cards:
            for n_requests, n_tokens in SHAPES:
                for cache in CACHES:
                    n_running, seconds = step(model, n_cards, cache, n_requests, n_tokens)
                    print(f"{model},{n_cards},{n_requests},{n_tokens},{cache},{n_running},{1e3 * seconds:.1f},"
                          f"{n_running / seconds:.0f}")


if __name__ == "__main__":
    main()
