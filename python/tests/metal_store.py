# SPDX-License-Identifier: MIT
"""A layer's arrays for the Metal kernels, made token by token in Python, and attention over them in float64."""
import mlx.core as mx
import numpy as np
import libturboquant
from libturboquant import metal_kernels as kernels
from libturboquant.weight_factors import channel_factors

SEED = libturboquant.SEED_DEFAULT
NUMBERS = {"sq8": 2, "sq4": 3, "sq3": 4, "sq2": 5, "tt4": 9, "tt3": 10, "tt2": 11}


class Layer:
    """
    Keys and values [n_head_kv, length, head_dim] of one sequence, of which the last n_query tokens come now. What was encoded
    before them (n_recent and n_batch say which tokens) and is by now lies encoded; the arrays of `kernels` hold the same bytes.
    factors: int8 [n_head_kv, head_dim], or None.
    """

    def __init__(self, rng, k_format, v_format, head_dim, length, n_query, n_head_kv=2, n_sink=4, n_recent=64, n_batch=64,
                 has_refs=True, factors=None):
        self.formats, self.has_refs, self.head_dim, self.factors = (k_format, v_format), has_refs, head_dim, factors
        offset = 3 * rng.standard_normal((n_head_kv, 1, head_dim))
        self.k = (rng.standard_normal((n_head_kv, length, head_dim)) + offset).astype(np.float16)
        if factors is not None:
            self.k = (self.k * channel_factors(factors)[:, None]).astype(np.float16)
        self.v = rng.standard_normal((n_head_kv, length, head_dim)).astype(np.float16)

        def coded_end(length):
            return max(max(length - n_recent, 0) // n_batch * n_batch, n_sink)

        self.before, self.coded = coded_end(length - n_query), coded_end(length)
        self.n_sink, self.length, self.n_query = n_sink, length, n_query
        self.query_ends = [max(self.before, coded_end(length - n_query + i + 1)) for i in range(n_query)]
        # Exact vectors: sinks, then what was exact before this call, then its own.
        exact = list(range(min(n_sink, length))) + list(range(max(self.before, n_sink), length))
        self.extent = kernels.Extent(length, n_sink, n_recent, n_batch, self.before, max(self.before, n_sink), len(exact))
        self.exact, self.n_recent = exact, n_recent
        self.k_decoded, self.v_decoded = self.k.astype(np.float64), self.v.astype(np.float64)
        self.arrays = self._encode(n_head_kv)

    def _encode(self, n_head_kv):
        capacity = -(-max(self.coded, 1) // kernels.BLOCK) * kernels.BLOCK + kernels.BLOCK
        span = range(self.n_sink, self.coded)
        n_blocks = capacity // kernels.BLOCK
        ref_bytes = np.zeros((n_head_kv, n_blocks, self.head_dim + 2), np.uint8)
        steps = np.zeros((n_head_kv, self.head_dim), np.int8) if self.factors is None else self.factors
        multiplied, divided = (channel_factors(x)[:, None] for x in (steps, -steps))
        k_coded = self.k.astype(np.float32) * divided
        k_reference = np.zeros_like(k_coded)
        if self.has_refs:
            for block in sorted({p // kernels.BLOCK for p in span}):
                first = max(block * kernels.BLOCK, self.n_sink)
                window = self.k[:, first : first + self.n_recent].astype(np.float32)
                mean = np.zeros_like(window[:, 0])
                for i in range(self.n_recent):
                    mean += window[:, i]
                ref_bytes[:, block] = libturboquant.encode(mean / np.float32(self.n_recent) * divided[:, 0], "sq8")
                reference = libturboquant.decode(ref_bytes[:, block], "sq8", self.head_dim)
                k_reference[:, block * kernels.BLOCK : (block + 1) * kernels.BLOCK] = reference[:, None]
        parts = []
        for rows, fmt in ((k_coded - k_reference, self.formats[0]), (self.v.astype(np.float32), self.formats[1])):
            width = libturboquant.format_info(fmt, self.head_dim).bytes_per_vector
            found, decoded = np.zeros((n_head_kv, capacity, width), np.uint8), np.zeros_like(rows)
            for head in range(n_head_kv):
                if len(span):
                    part = slice(span.start, span.stop)
                    found[head, part] = libturboquant.encode(rows[head, part], fmt)
                    decoded[head, part] = libturboquant.decode(found[head, part], fmt, self.head_dim)
            parts.append((found, decoded))
        part = slice(span.start, max(span.stop, span.start))
        self.k_decoded[:, part] = ((parts[0][1] + k_reference) * multiplied)[:, part]
        self.v_decoded[:, part] = parts[1][1][:, part]

        def plane(records):
            codes = records[..., 2:]
            codes = np.pad(codes, [(0, 0)] * 2 + [(0, -codes.shape[2] % 4)]).view(np.uint32)  # words, the last not always full
            scales = np.ascontiguousarray(records[..., :2]).view(np.float16)[..., 0]
            return mx.array(codes)[None], mx.array(scales)[None]

        scale = np.ascontiguousarray(ref_bytes[..., :2]).view(np.uint16).astype(np.uint32)
        refs = np.concatenate([np.ascontiguousarray(ref_bytes[..., 2:]).view(np.uint32), scale], axis=2)
        exact = [np.concatenate([x[:, self.exact], np.full_like(x[:, :3], np.nan)], axis=1) for x in (self.k, self.v)]
        k, v = (plane(found) for found, _ in parts)
        return kernels.Arrays(*k, mx.array(refs)[None], *v, *(mx.array(x)[None] for x in exact))

    def attend(self, q, scale, sinks=None):
        """q [n_head, n_query, head_dim]: the same in float64. sinks [n_head]: learned ones."""
        n_head_kv = len(self.k)
        group, out = len(q) // n_head_kv, np.zeros(q.shape)
        for head in range(len(q)):
            for i in range(self.n_query):
                end, last = self.query_ends[i], self.length - self.n_query + i + 1
                keys, values = (np.concatenate([plain[head // group][: self.n_sink], coded[head // group][self.n_sink : end],
                                                plain[head // group][max(end, self.n_sink) : last]])[:last]
                                for plain, coded in ((self.k, self.k_decoded), (self.v, self.v_decoded)))
                s = scale * (keys.astype(np.float64) @ q[head, i].astype(np.float64))
                p = np.exp(s - s.max())
                out[head, i] = p @ values / (p.sum() + (0 if sinks is None else np.exp(sinks[head] - s.max())))
        return out

    def kernel_attend(self, q, scale, dtype=mx.float32, sinks=None):
        optional = [None if x is None else mx.array(x) for x in (sinks, self.factors)]
        out = kernels.attend(mx.array(q)[None].astype(dtype), self.arrays, *(NUMBERS[f] for f in self.formats), self.has_refs,
                             self.extent, scale, SEED, *optional)
        return np.array(out[0].astype(mx.float32))
