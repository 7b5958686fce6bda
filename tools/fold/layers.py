# SPDX-License-Identifier: MIT
"""
Where a GGUF model makes its queries and keys, by architecture: llama.cpp's src/models and llama_model_rope_type. An
architecture is understood if what lies between projections and attention is known: an optional norm, RoPE, nothing else that
tells channels apart.
"""
from dataclasses import dataclass, field

import numpy as np

from eval.llama import LlamaError

# RoPE turns channels i and i + n / 2 of n, 2 i and 2 i + 1, or none.
HALVES = set("""
    afmoe apertus bailingmoe2 codeshell dots1 exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 gemma3n gemma4
    glm4moe gpt-oss gptneox grok hunyuan-dense hunyuan-moe lfm2 lfm2moe mellum minimax-m2 nemotron olmo2 olmoe orion phi2 phi3
    phimoe qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe seed_oss smallthinker
    stablelm starcoder2
    """.split())
NEIGHBOURS = set("""
    arcee baichuan cohere2 command-r deci deepseek ernie4_5 ernie4_5-moe glm4 granite granitehybrid granitemoe internlm2 llama
    minicpm mistral3 olmo smollm3 starcoder xverse
    """.split())
NO_ROPE = set("bloom gpt2 jais jamba mpt nemotron_h nemotron_h_moe".split())
# Why others, which people run, are refused.
LATENT = "keeps one latent in place of keys, which all heads share and values are read from"
REFUSED = {**dict.fromkeys(("deepseek2", "deepseek32", "deepseek4", "glm-dsa", "kimi-k3", "kimi-linear", "minicpm3", "mistral4",
                            "plm"), LATENT),
           "llama4": "normalizes queries and keys behind RoPE, where no weight could take a factor",
           **dict.fromkeys(("bert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "modern-bert", "nomic-bert",
                            "nomic-bert-moe", "t5", "t5encoder"), "has no KV cache of the kind that is coded"),
           **dict.fromkeys(("mamba", "mamba2", "rwkv6", "rwkv7", "arwkv7"), "has no attention, and so no keys")}
GEMMA3N_OWN = 20  # layers with keys of their own; the others share them, by a rule that is not in the file
GEMMA3N_PATTERN = 5  # each 5th layer sees all tokens


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor, all of them n_all; of norms and biases, values."""
    tensor: object
    first: int
    n: int
    n_all: int


@dataclass
class Side:
    """How a layer makes its queries, or its keys."""
    n_head: int
    head_dim: int
    weight: Rows
    biases: list
    norm: list  # weight and perhaps bias of the norm behind the projection
    input_norm: list  # the same of that before it
    has_gate: bool = False  # each head's rows are followed by as many of a gate

    @property
    def targets(self):
        """What factors go into: whatever is nearest to attention."""
        return self.norm or [self.weight, *self.biases]

    @property
    def is_shared(self):
        """Has its norm one weight for all heads?"""
        return bool(self.norm) and self.norm[0].n == self.head_dim < self.n_head * self.head_dim


@dataclass
class Group:
    """A layer with keys of its own, and all queries that see these."""
    layer: int
    n_head_kv: int
    head_dim: int
    partners: np.ndarray
    keys: Side
    queries: list = field(default_factory=list)


class Model:
    """What a GGUF file says of itself. path: for messages."""

    def __init__(self, reader, path):
        self.path = path
        self.metadata = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.arch = self.get("general.architecture", "")
        self.n_layer = int(self.own("block_count", 0))

    def get(self, name, default=None):
        found = self.metadata.get(name)
        return default if found is None else found.contents()

    def own(self, name, default=None, layer=None):
        """The architecture's own value, of one layer where each has its own."""
        found = self.get(f"{self.arch}.{name}", default)
        return found[layer] if layer is not None and isinstance(found, list) else found

    def refuse(self, why, cure):
        raise LlamaError(f"{self.path}: {why}; {cure}")

    def check(self):
        """Refuse what is not understood as a whole."""
        cure = "use it as it is: the plug-in (tq run) needs no folded file"
        if self.get("split.count", 1) > 1:
            self.refuse(f"this is one of {self.get('split.count')} files of a model", "join them by llama-gguf-split --merge")
        if self.get("general.type", "model") != "model":
            self.refuse(f"this is not a model but of type {self.get('general.type')}", "name the model's own file")
        if self.arch in REFUSED:
            self.refuse(f"architecture {self.arch} {REFUSED[self.arch]}", cure)
        if self.arch not in HALVES | NEIGHBOURS | NO_ROPE:
            self.refuse(f"architecture {self.arch or '(none)'} is not understood", cure)
        if self.own("attention.clamp_kqv", 0) > 0:
            self.refuse("it cuts queries and keys off at a value, which a factor would change", cure)

    def partners(self, layer, head_dim):
        """The channel that RoPE turns each with, as from_energies takes them."""
        found = np.arange(head_dim, dtype=np.int32)
        if self.arch in NO_ROPE:
            return found
        is_narrow = head_dim == self.own("attention.key_length_swa") and self.sees_window(layer)
        n = self.own("rope.dimension_count", head_dim, layer)
        n = min(int(self.own("rope.dimension_count_swa", n) if is_narrow else n), head_dim)
        if self.arch in HALVES or any(self.own("rope.dimension_sections", [])):
            found[:n] = np.roll(found[:n], n // 2)
        else:
            found[:n] ^= 1
        return found

    def sees_window(self, layer):
        if self.arch == "gemma3n":
            return layer % GEMMA3N_PATTERN != GEMMA3N_PATTERN - 1
        pattern = self.own("attention.sliding_window_pattern", [])
        return bool(pattern[layer]) if isinstance(pattern, list) and layer < len(pattern) else False

    def owner(self, layer):
        """The layer whose keys this one sees."""
        n_shared = int(self.own("attention.shared_kv_layers", 0)) if self.arch == "gemma4" else 0
        n_own = min(GEMMA3N_OWN, self.n_layer) if self.arch == "gemma3n" else self.n_layer - n_shared
        return layer if layer < n_own else n_own - (2 if self.sees_window(layer) else 1)

    def parts(self, *names):
        """All rows of those tensors that there are."""
        found = [self.tensors[name] for name in names if name in self.tensors]
        return [Rows(tensor, 0, *2 * (int(tensor.n_elements),)) for tensor in found]

    def side(self, layer, kind, n_head, n_head_kv):
        """The queries ("q") or keys ("k") of a layer with attention. None: it has none."""
        blk = f"blk.{layer}.attn_"
        own, fused = self.tensors.get(f"{blk}{kind}.weight"), self.tensors.get(f"{blk}qkv.weight")
        norms = [self.parts(f"{blk}{name}.weight", f"{blk}{name}.bias") for name in (f"{kind}_norm", "norm")]
        if own is not None:
            n = int(own.shape[1])
            return Side(n_head, n // n_head, Rows(own, 0, n, n), self.parts(f"{blk}{kind}.bias"), *norms)
        # Layers without attention, next to such with it, may have a projection of the same name.
        if fused is None or any(name.startswith(f"blk.{layer}.ssm_") for name in self.tensors):
            return None
        n_all = self.own("attention.head_count", layer=layer) + 2 * n_head_kv
        n_rows = int(fused.shape[1])
        head_dim = n_rows // n_all
        first, n = (n_all - 2 * n_head_kv) * head_dim if kind == "k" else 0, n_head * head_dim
        biases = [Rows(part.tensor, first, n, n_rows) for part in self.parts(f"{blk}qkv.bias")]
        return Side(n_head, head_dim, Rows(fused, first, n, n_rows), biases or self.parts(f"{blk}{kind}.bias"), *norms)

    def groups(self):
        """All Groups of the model, by their layers."""
        found = {}
        for layer in range(self.n_layer):
            n_head, n_head_kv = (int(self.own(f"attention.{name}", 0, layer) or 0) for name in ("head_count", "head_count_kv"))
            n_head_kv = n_head_kv or n_head
            if not n_head:
                continue
            owner = self.owner(layer)
            queries, keys = (self.side(layer, kind, n, n_head_kv) for kind, n in (("q", n_head), ("k", n_head_kv)))
            if queries is None:
                continue
            if owner == layer:
                if keys is None:
                    self.refuse(f"layer {layer} has queries and no keys, which is not understood", "use it as it is")
                partners = self.partners(layer, keys.head_dim)
                found[layer] = Group(layer, n_head_kv, keys.head_dim, partners, keys)
            self.add(found[owner], queries, layer)
        return list(found.values())

    def add(self, group, queries, layer):
        if queries.head_dim == 2 * group.head_dim and queries.norm:
            queries.head_dim, queries.has_gate = group.head_dim, True
        if queries.head_dim != group.head_dim or queries.n_head % group.n_head_kv:
            self.refuse(f"layer {layer} has {queries.n_head} query heads of {queries.head_dim} values for {group.n_head_kv} KV "
                        f"heads of {group.head_dim}, which is not understood", "use it as it is")
        group.queries.append(queries)
