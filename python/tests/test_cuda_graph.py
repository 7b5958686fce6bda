# SPDX-License-Identifier: MIT
"""A step of decoding in a CUDA graph, on a real device: TQ_TEST_BACKEND=cuda (tiny.py)."""
import pytest
import torch
import libturboquant
from tiny import BACKEND, CACHE, SQ8, compressed, ids, logits, make_model, same_tokens, use_attention_of

if BACKEND != "cuda":
    pytest.skip("TQ_TEST_BACKEND is not cuda", allow_module_level=True)

N_TOK = 20


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def llama(request):
    return make_model("llama", request.param)


class Decoder:
    """Greedy steps that keep token and position where they are, as a graph wants."""

    def __init__(self, model, cache, input_ids, mask=None):
        use_attention_of(model, cache)
        self.model, self.cache = model, cache
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device="cuda") if mask is None else mask.sum(1)
        options = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        self.token = model(input_ids, **{CACHE: cache}, **options).logits[:, -1].argmax(-1, keepdim=True)
        self.position, self.graph = lengths[:, None].clone(), None
        self.found = [self.token.clone()]

    def step(self):
        scores = self.model(self.token, position_ids=self.position, **{CACHE: self.cache}).logits[:, -1]
        self.token.copy_(scores.argmax(-1, keepdim=True))
        self.position.add_(1)

    def run(self, n, captured):
        """n tokens more; captured: the first is a plain step, the others replay a graph."""
        for i in range(n):
            if captured and i > 0:
                self.graph.replay()
                self.cache.replayed()
            else:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self.step()
                torch.cuda.current_stream().wait_stream(side)
                if captured:
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph):
                        self.step()
            self.found.append(self.token.clone())
        return torch.cat(self.found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize("formats", [SQ8, {"preset": "TQ3"}], ids=["sq8", "TQ3"])
def test_captured_steps(llama, n_batch, formats):
    """The tokens of plain steps; then, without the graph, the next logits."""
    input_ids, found, nexts = ids(n_batch, 120), [], []
    for captured in (False, True):
        # compressed() gives SQ8 where no format is named.
        cache = compressed(llama, max_tokens=300, **({"k_format": None, "v_format": None} | formats))
        found.append(Decoder(llama, cache, input_ids).run(N_TOK, captured))
        assert cache.get_seq_length() == cache.store.length(cache.seqs[0]) == 120 + N_TOK
        cache.crop(-3)
        nexts.append(logits(llama, cache, found[0][:, -4:]))
    assert same_tokens(llama, torch.cat([input_ids, found[1]], dim=1), torch.cat([input_ids, found[0]], dim=1))
    if torch.equal(*found):
        torch.testing.assert_close(nexts[1], nexts[0], atol=.1, rtol=0)


@torch.no_grad()
def test_captured_steps_after_padding(llama):
    """Padding of the prompt is known to the cache: captured steps pass no mask."""
    input_ids, mask = ids(2, 120), torch.ones(2, 120, dtype=torch.long, device="cuda")
    mask[0, :50], input_ids[0, :50] = 0, 0
    cache = compressed(llama, max_tokens=300)
    decoder = Decoder(llama, cache, input_ids, mask)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    whole = torch.cat([mask, torch.ones(2, 1, dtype=torch.long, device="cuda")], dim=1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        scores = llama(decoder.token, attention_mask=whole, position_ids=decoder.position, **{CACHE: cache}).logits[:, -1]
        decoder.token.copy_(scores.argmax(-1, keepdim=True))
        decoder.position.add_(1)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        decoder.step()
    for _ in range(5):
        graph.replay()
        cache.replayed()
    assert [cache.store.length(seq) for seq in cache.seqs] == [76, 126]


@torch.no_grad()
def test_capture_without_room(llama):
    cache = compressed(llama)
    decoder = Decoder(llama, cache, ids(1, 128))  # a page's worth beyond the ring
    with pytest.raises(libturboquant.ArgumentError, match="reserve all tokens"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        decoder.step()


@torch.no_grad()
def test_a_step_does_not_wait(llama):
    """No copy to or from the host, nor any other wait, in a step of decoding."""
    cache = compressed(llama, max_tokens=300)
    decoder = Decoder(llama, cache, ids(2, 120))
    decoder.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
