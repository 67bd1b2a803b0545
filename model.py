"""A Llama / Qwen decoder in plain PyTorch, leaf to root; stretched rotary embeddings come last.

One token through this file:
    its id picks a row of `embed_tokens`: a vector of width d
    every layer adds two corrections to that vector:
        attention: what earlier tokens have to say (`RMSNorm`, q/k/v, rotation, softmax, `o_proj`)
        MLP:       what this token makes of it     (`RMSNorm`, down(silu(gate) * up))
    a last `RMSNorm` gives the hidden state h, which is where SLOT cuts in:
        hidden = lm.model(tokens, cache)  (B, T, d);   logits = lm.lm_head(hidden)  (B, T, V)
Llama, Qwen2 and Qwen3 differ in a few switches only: biases, norm on q/k, rope scaling, tied head.
Names (`q_proj`, ...) are the checkpoint's own: each leads from the file to the line.

Letters: B batch, T new tokens, S all tokens so far (cached + new), d width, H query heads,
K key/value heads, D head_dim, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    """What config.json says of the mathematics. Field names are the file's where it has them."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool          # Qwen2: always. Llama, Qwen3: `attention_bias`
    o_bias: bool            # Llama, Qwen3: `attention_bias`. Qwen2: never
    mlp_bias: bool          # Llama: `mlp_bias`
    qk_norm: bool           # Qwen3
    rope: dict              # rope_type, rope_theta and what that type needs: `rope_frequencies`
    dtype: str | None       # what the file calls `torch_dtype` or `dtype`


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()                                 # squares overflow float16
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class RotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        inv_freq, self.scale = rope_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)    # moves with .to(device)

    def forward(self, positions):
        """positions (B or 1, T) -> cos, sin, each (B or 1, 1, T, D), as `rotate` needs them: sin is
        negative in its first half. float32 whatever the model's dtype: angles reach the thousands,
        where bfloat16 skips whole numbers."""
        angles = positions[:, None, :, None] * self.inv_freq            # (B, 1, T, D/2)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair of dimensions (a, b) of x (B, heads, T, D): (a cos - b sin, b cos + a sin), as
    in RoFormer (arXiv 2104.09864).

    Two layouts exist. The RoPE paper and Meta's own files pair neighbours (2i, 2i+1). Hugging Face
    checkpoints, which this project reads, have the rows of q_proj and k_proj permuted so that pairs
    lie half a head apart, (i, i + D/2): rolling x by half a head swaps a and b.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of every layer for up to `max_len` tokens, and how many are filled (`pos`).

    `k`, `v`: (layers, B, K, max_len, D), allocated once. A forward pass writes its T new tokens at
    pos..pos+T, layer by layer; the decoder moves `pos` on once, after the last layer. `mask`
    (B, max_len) bool is True where a token counts, or None when no row is padded.
    """

    def __init__(self, config, batch_size, max_len, device="cpu", dtype=torch.float32):
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.k = torch.zeros(layers, batch_size, K, max_len, D, device=device, dtype=dtype)
        self.v = torch.zeros(layers, batch_size, K, max_len, D, device=device, dtype=dtype)
        self.max_len, self.pos, self.mask = max_len, 0, None

    def update(self, layer, k, v):
        """Write k, v (B, K, T, D) of a layer -> its keys and values so far, (B, K, S, D)."""
        end = self.pos + k.shape[2]
        self.k[layer, :, :, self.pos:end] = k
        self.v[layer, :, :, self.pos:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        d, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
        K = config.num_key_value_heads
        self.layer, self.D = layer, D
        self.q_proj = nn.Linear(d, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, d, bias=config.o_bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, visible, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.D)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.D)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.D).transpose(1, 2)               # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                               # (B, K, S, D)
        if T == 1:
            # H/K query heads share a key/value head. With one new token there is no causal order to
            # keep, so they take the place of the sequence: each key is read once for all of them.
            q = q.reshape(B, k.shape[1], -1, self.D)                            # (B, K, H/K, D)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            out = out.reshape(B, 1, -1)                                         # (B, 1, H D)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=True)
            out = out.transpose(1, 2).reshape(B, T, -1)                         # (B, T, H D)
        return self.o_proj(out)                                                 # (B, T, d)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, inner, bias=bias)
        self.up_proj = nn.Linear(d, inner, bias=bias)
        self.down_proj = nn.Linear(inner, d, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, visible, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)  # random: 1 s of imports
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, tokens, cache=None, mask=None):
        """tokens (B, T) int64 -> hidden (B, T, d) after the final norm: what SLOT calls h.

        With a `cache` the tokens continue what it holds, and it is advanced by T; ValueError if
        they do not fit. `mask` (B, T) bool, True = a real token, for batches of different lengths;
        padding belongs to the left, so that all rows write the same column of the cache next.
        """
        T = tokens.shape[1]
        past = cache.pos if cache is not None else 0
        if cache is not None and past + T > cache.max_len:
            raise ValueError(f"{past} + {T} tokens do not fit in a KVCache for {cache.max_len}")
        x = self.embed_tokens(tokens)                                           # (B, T, d)
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None], 0)     # so that padding can never be infinite
        positions, visible = self.positions_and_mask(tokens, past, cache, mask)
        cos, sin = self.rotary_emb(positions)
        for layer in self.layers:
            x = layer(x, cos, sin, visible, cache)
        if cache is not None:
            cache.pos = past + T
        return self.norm(x)

    def positions_and_mask(self, tokens, past, cache, mask):
        """-> positions (B or 1, T), and what attention may see: None, or bool (B or 1, 1, T, S)."""
        (B, T), device = tokens.shape, tokens.device
        if cache is not None:
            if mask is not None:
                if cache.mask is None:
                    cache.mask = torch.ones(B, cache.max_len, dtype=torch.bool, device=device)
                cache.mask[:, past:past + T] = mask
            if cache.mask is not None:
                mask = cache.mask[:, :past + T]                                 # (B, S)
        if mask is None:
            positions = torch.arange(past, past + T, device=device)[None]       # (1, T)
            # One token sees all keys; T tokens on an empty cache are the causal triangle, for
            # which torch has a fast path. Only T > 1 tokens behind a filled cache need a mask:
            # `is_causal` aligns its triangle to the top left, so the first of them would see key 0
            # alone, when it may see all `past` keys and itself.
            if T == 1 or past == 0:
                return positions, None
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]    # (B, T): real tokens count
        queries = torch.arange(past, past + T, device=device)[:, None]          # (T, 1)
        keys = torch.arange(past + T, device=device)                            # (S,)
        visible = (keys <= queries)[None, None]                                 # (1, 1, T, S)
        if mask is not None:            # a padded query sees itself, or its softmax would be 0/0
            visible = visible & (mask[:, None, None, :] | (keys == queries))
        return positions, visible


class CausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Small models save a matrix: the row that a token is read from also predicts it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, cache=None, mask=None):
        """Both halves: tokens (B, T) -> logits (B, T, V). SLOT works between them."""
        return self.lm_head(self.model(tokens, cache, mask))


def rope_frequencies(config):
    """-> inv_freq (D/2,) float32, radians per position of each pair; and a factor on cos and sin.
    default: theta^(-2i/D). The other types stretch a model to longer prompts than it has seen:
    linear slows every pair; llama3 only the slow ones, with a smooth passage; yarn (arXiv
    2309.00071, section 3) likewise, by the turns that a pair makes over the original length, and
    sharpens attention by the factor.
    """
    rope, D, base = config.rope, config.head_dim, config.rope["rope_theta"]
    inv_freq = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if rope["rope_type"] == "default":
        return inv_freq, 1.0
    slowed = inv_freq / rope["factor"]
    if rope["rope_type"] == "linear":
        return slowed, 1.0

    # keep: 1 where a fast pair stays as it is, 0 where a slow one is slowed down
    length = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        turns = length * inv_freq / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * slowed, 1.0

    def pair_with_turns(n):             # the (fractional) index of the pair that turns n times
        return D * math.log(length / (n * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with_turns(rope["beta_fast"]), pair_with_turns(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(D // 2, device="cpu")
    keep = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * slowed, yarn_sharpening(rope)


def yarn_sharpening(rope):
    """The factor on cos and sin: given, or 0.1 ln(factor) + 1 (arXiv 2309.00071, equation 22)."""
    def sharpen(m):
        return 0.1 * m * math.log(max(rope["factor"], 1)) + 1

    if "attention_factor" in rope:
        return rope["attention_factor"]
    if "mscale" in rope and "mscale_all_dim" in rope:           # DeepSeek's; only both count
        return sharpen(rope["mscale"]) / sharpen(rope["mscale_all_dim"])
    return sharpen(1)
