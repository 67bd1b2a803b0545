"""A Llama / Qwen decoder in plain PyTorch, leaf to root: rotary embedding, norm, cache, attention, MLP, layer, decoder, model.

One token through this file:
    its id picks a row of `embed_tokens`: a vector of width d
    every layer adds two corrections to that vector:
        attention: what earlier tokens have to say (`RMSNorm`, q/k/v projections, rotation by position, softmax, `o_proj`)
        MLP:       what this token makes of it     (`RMSNorm`, down(silu(gate) * up))
    a last `RMSNorm` gives the hidden state h, which is where SLOT cuts in:
        hidden = lm.model(tokens, cache)        (B, T, d)
        logits = lm.lm_head(hidden)             (B, T, V)
Llama, Qwen2 and Qwen3 differ in four switches only: bias on q/k/v, norm on q/k, rope scaling, and whether the head is tied.
All names (`q_proj`, `input_layernorm`, ...) are the checkpoint's own: a name in the file leads to the line that uses it.

Letters: B batch, T new tokens, S all tokens so far (cached + new), d width, H query heads, K key/value heads, D head_dim,
V vocabulary.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Config
from linear import Linear


def rope_frequencies(config):
    """-> inv_freq (D/2,) float32: radians per position of every pair of dimensions; and a factor on both cos and sin.

    default: theta^(-2i/D) (RoFormer, arXiv 2104.09864). The others stretch a model to longer prompts than it was trained on:
    linear slows every pair; llama3 only the slow ones, with a smooth passage; yarn (arXiv 2309.00071, section 3) likewise by
    counting the turns that a pair makes over the original length, and sharpens attention by the factor.
    """
    rope, D, base = config.rope, config.head_dim, config.rope["rope_theta"]
    inv_freq = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)     # over the original length
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)       # 1: a fast pair stays as it is; 0: a slow one is slowed down
        return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"], 1.0
    if rope["rope_type"] == "yarn":
        def pair_with_turns(n):     # the (fractional) index of the pair that turns n times over the original length
            return D * math.log(rope["original_max_position_embeddings"] / (n * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_with_turns(rope["beta_fast"]), pair_with_turns(rope["beta_slow"])
        if rope["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        high += 0.001 * (low == high)
        keep = 1 - ((torch.arange(D // 2, device="cpu") - low) / (high - low)).clamp(0, 1)
        # get_mscale of the paper's code; the pair mscale/mscale_all_dim (DeepSeek) counts only when both are given.
        sharpen = lambda m: 0.1 * m * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
        both = "mscale" in rope and "mscale_all_dim" in rope
        factor = sharpen(rope["mscale"]) / sharpen(rope["mscale_all_dim"]) if both else sharpen(1)
        return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"], rope.get("attention_factor", factor)
    return inv_freq, 1.0


class RotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        inv_freq, self.scale = rope_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)            # follows .to(device), is in no file

    def forward(self, positions):
        """positions (B or 1, T) -> cos, sin, each (B or 1, 1, T, D), sin negative in its first half as `rotate` needs it.
        float32 whatever the model's dtype: angles reach the thousands, where bfloat16 knows whole numbers at best."""
        angles = positions[:, None, :, None] * self.inv_freq                    # (B, 1, T, D/2)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)    # (B, 1, T, D)


def rotate(x, cos, sin):
    """Turn every pair of dimensions (a, b) of x (B, heads, T, D) by its angle: (a cos - b sin, b cos + a sin).

    Two layouts exist. The RoPE paper and Meta's own files pair neighbours (2i, 2i+1). Hugging Face checkpoints, which this
    project reads, have the rows of q_proj and k_proj permuted already so that pairs lie half a head apart, (i, i + D/2):
    so rolling x by half a head puts b in the place of a and a in the place of b.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()                                                         # squares overflow float16
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class KVCache:
    """Keys and values of every layer for up to `max_len` tokens, allocated once, and how many are filled (`pos`).

    `k`, `v`: (layers, B, K, max_len, D) - the key/value heads only, not repeated for every query head. A forward pass writes
    its T new tokens at pos..pos+T in place and moves `pos` on once, after the last layer.
    `mask` (B, max_len) bool, or None when no row is padded: True where a token counts.
    """
    def __init__(self, config, batch_size, max_len, device="cpu", dtype=torch.float32):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_len, self.pos, self.mask = max_len, 0, None

    def update(self, layer, k, v):
        """Write k, v (B, K, T, D) of one layer behind the cached ones -> views of all S = pos + T, (B, K, S, D)."""
        end = self.pos + k.shape[2]
        self.k[layer, :, :, self.pos:end] = k
        self.v[layer, :, :, self.pos:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep_rows(self, rows):
        """Go on with these rows of the batch only."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.mask = self.mask[rows] if self.mask is not None else None


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        d, D, qkv_bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.layer, self.D = layer, D
        self.q_proj = Linear(d, config.num_attention_heads * D, bias=qkv_bias)
        self.k_proj = Linear(d, config.num_key_value_heads * D, bias=qkv_bias)
        self.v_proj = Linear(d, config.num_key_value_heads * D, bias=qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * D, d, bias=config.o_bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.D)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.D)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.D).transpose(1, 2)               # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                               # (B, K, S, D)
        if T == 1:
            # H/K query heads share one key/value head. With one token and no order among queries they can stand where
            # torch expects a sequence of queries: the keys are read once, and nothing is repeated in memory. (`to`: what
            # compiled.py computes in float32 meets a cache in the model's dtype.)
            out = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.D).to(k.dtype), k, v, attn_mask=mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.reshape(B, -1, T, self.D).transpose(1, 2).reshape(B, T, -1))     # (B, T, d)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, inner, bias=bias)
        self.up_proj = Linear(d, inner, bias=bias)
        self.down_proj = Linear(inner, d, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))     # `_weight`: without initial values
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, tokens, cache=None, mask=None):
        """tokens (B, T) int64 -> hidden (B, T, d) after the final norm: what SLOT calls h.

        With a `cache` the tokens continue what it holds, and it is advanced by T. `mask` (B, T) bool, True = a real token:
        for batches of prompts of different length. Padding may stand anywhere; put it to the left, so that the last column
        is the last token of every row and all rows write the same column of the cache while decoding.
        """
        B, T = tokens.shape
        past = cache.pos if cache is not None else 0
        if cache is not None and past + T > cache.max_len:
            raise ValueError(f"KVCache: {past} + {T} tokens do not fit in max_len {cache.max_len}; allocate a longer cache")
        positions, mask = self.positions_and_mask(B, T, past, cache, mask, tokens.device)
        cos, sin = self.rotary_emb(positions)
        x = self.embed_tokens(tokens)                                           # (B, T, d)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.pos = past + T
        return self.norm(x)

    def positions_and_mask(self, B, T, past, cache, mask, device):
        """-> positions (B or 1, T), and what attention may see: None, or bool (B or 1, 1, T, S)."""
        if mask is not None and cache is not None and cache.mask is None:
            cache.mask = torch.ones(B, cache.max_len, dtype=torch.bool, device=device)
        if cache is not None and cache.mask is not None:
            if mask is not None:
                cache.mask[:, past:past + T] = mask
            mask = cache.mask[:, :past + T]                                     # (B, S)
        if mask is None:
            positions = torch.arange(past, past + T, device=device)[None]       # (1, T)
            # One token sees all keys; T tokens on an empty cache are the causal triangle, for which torch has a fast path.
            # Only T > 1 tokens behind a filled cache need a mask of their own: `is_causal` aligns its triangle to the top
            # left, so the first of them would see key 0 alone, when it may see all `past` keys and itself.
            if T == 1 or past == 0:
                return positions, None
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]            # (B, T): padding does not count
        queries = torch.arange(past, past + T, device=device)[:, None]          # (T, 1)
        keys = torch.arange(past + T, device=device)                            # (S,)
        see = (keys <= queries)[None, None]                                     # (1, 1, T, S)
        if mask is not None:                                                    # a padded query sees itself, or softmax is 0/0
            see = see & (mask[:, None, None, :] | (keys == queries))
        return positions, see


class CausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self):
        """Small models save a matrix: the row that a token is read from is also the row that it is predicted by."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, cache=None, mask=None):
        """The two halves in one call: tokens (B, T) -> logits (B, T, V). SLOT works between them."""
        return self.lm_head(self.model(tokens, cache, mask))
