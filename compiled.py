"""Decoding by compiled programs: generate.py --compile.

Token after token, model.py asks torch for some 70 small operations a layer, and while Python and torch prepare them, no weights
are read. torch.compile makes one program of them. It can if nothing changes from token to token but the numbers in tensors: the
position is a tensor here, the new keys and values are written where it says, and attention looks at a fixed span of the cache, of
which a mask hides what is not filled yet. The layers are those of model.py. One program of a few layers serves them all in turn.

On a CPU the program is C++, and activations are float32 but inside attention, whatever the weights' dtype (see linear.py). On
CUDA it is a graph of kernels that is recorded once and replayed. Compiling takes up to a minute; torch keeps the result on disk,
and the next time it takes seconds.

Letters: K key/value heads, S positions of the cache that attention looks at, D head_dim, d width, V vocabulary.
"""
import math

import torch

from checks import show
from linear import Linear, weight_words

SPAN = 1024             # S grows by so much at a time
TOGETHER = 8            # layers a program: more take longer to compile, fewer to start


class Span:
    """What attention sees of a KVCache, for one token at `position` (1,): keys and values (1, K, S, D), layer after layer."""
    def __init__(self, keys, values, position):
        self.layers, self.position = list(zip(keys, values)), position

    def update(self, _, k, v):
        keys, values = self.layers.pop(0)
        keys.index_copy_(2, self.position, k.to(keys.dtype))
        values.index_copy_(2, self.position, v.to(values.dtype))
        return keys, values


def begin(model, token, position, keys):
    """-> x (1, 1, d), cos and sin (1, 1, 1, D), and the mask (1, 1, 1, S): what all layers need."""
    later = torch.arange(keys.shape[2], device=token.device) > position
    mask = torch.zeros_like(later, dtype=keys.dtype).masked_fill(later, -math.inf)
    x = model.embed_tokens(token)                                               # (1, 1, d)
    return x.float() if x.is_cpu else x, *model.rotary_emb(position[None]), mask[None, None, None]


def some_layers(layers, x, cos, sin, mask, position, keys, values):
    span = Span(keys, values, position)
    for layer in layers:
        x = layer(x, cos, sin, mask, span)
    return x                                                                    # (1, 1, d)


def end(lm, x):
    return lm.lm_head(lm.model.norm(x))[:, -1].float()                          # (1, V)


def compile_step(lm, cache):
    """-> a function from token (1, 1) to logits (1, V) float32, which does what `lm(token, cache)` does. Compiles here, not at the
    first token. Raises ValueError for a cache of several rows or with padding, a device other than cpu and cuda, and where torch
    cannot compile; the function does when the cache is full. On a CPU it leaves `words` in every Linear of lm."""
    device = cache.k.device
    if cache.k.shape[1] != 1 or cache.mask is not None:
        raise ValueError("--compile: decodes one prompt, not a batch; leave it out")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--compile: for cpu and cuda, not for {device}; leave it out")
    if device.type == "cuda":
        how = dict(mode="reduce-overhead")
    else:
        for linear in (m for m in lm.modules() if isinstance(m, Linear)):
            linear.words = weight_words(linear.weight)
        # Products are loops over the rows of W: what the rows have in common, such as a norm, is to be computed before the loop.
        # The vectors' width in bits is said because torch looks up its kept results without regard to it.
        how = dict(options={"realize_reads_threshold": 0, "realize_opcount_threshold": 0, "size_asserts": False,
                            "cpp.enable_floating_point_contract_flag": "fast",
                            "cpp.simdlen": {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())})
    torch._dynamo.config.recompile_limit = 64           # programs that torch keeps of a function: every shape of model needs its own
    begin_program, layers_program, end_program = (torch.compile(f, fullgraph=True, **how) for f in (begin, some_layers, end))
    parts = [slice(i, i + TOGETHER) for i in range(0, len(lm.model.layers), TOGETHER)]
    layers = [lm.model.layers[part] for part in parts]
    span, keys, values = 0, [], []

    @torch.no_grad()
    def step(token):
        nonlocal span, keys, values
        if cache.pos == cache.max_len:
            raise ValueError(f"KVCache: one more token does not fit in max_len {cache.max_len}; allocate a longer cache")
        if cache.pos >= span:
            span = min(cache.max_len, (cache.pos // SPAN + 1) * SPAN)
            keys, values = ([layer[:, :, :span] for layer in tensor] for tensor in (cache.k, cache.v))
            for tensor in keys + values:
                if tensor.is_cuda:
                    torch._dynamo.mark_static_address(tensor)       # a recorded graph writes where it was recorded
                else:
                    torch._dynamo.mark_dynamic(tensor, 2)           # one program for every S
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()              # what the recorded graphs gave before may be overwritten
        position = torch.full((1,), cache.pos, device=device)
        x, *shared = begin_program(lm.model, token, position, keys[0])
        for some, part in zip(layers, parts):
            x = layers_program(some, x, *shared, position, keys[part], values[part])
        logits = end_program(lm, x)
        cache.pos += 1
        return logits

    if cache.pos == cache.max_len:
        return step                                                 # there is nothing to decode
    start, token = cache.pos, torch.zeros(1, 1, dtype=torch.int64, device=device)
    try:
        step(token)
        if span < cache.max_len:                                    # a span that ends with the cache is laid out differently
            cache.pos = cache.max_len - 1
            step(token)
            span = 0
    except Exception as error:                                      # torch's many kinds of error share no class of their own
        reason = show(str(error).strip().split("\n")[0], 160)
        raise ValueError(f"--compile: torch.compile fails here ({reason}); install a C++ compiler such as g++, or leave it out") from None
    cache.pos = start                                               # the real tokens overwrite what these left
    return step
