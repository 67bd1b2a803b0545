"""config.json -> Config: every field that changes the mathematics is implemented or refused, none is guessed.

Llama 2 to 3.3, Qwen2, Qwen2.5, Qwen3 and the R1 distillations of them differ in a few switches only:

                        q/k/v bias          q/k norm    rope_type               tied head
    llama               attention_bias      no          default, linear, llama3  by config
    qwen2               yes (o_proj none)   no          default, yarn            by config
    qwen3               attention_bias      yes         default, yarn            by config
"""
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from checks import read_json, show, token_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REQUIRED = object()


@dataclass(frozen=True)
class Config:
    """What config.json says of the mathematics. Field names are the file's; `from_folder` implements or refuses each."""
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
    rope: dict              # rope_type, rope_theta and what that type needs; see model.rope_frequencies
    dtype: str | None       # what the file calls `torch_dtype` or `dtype`

    @classmethod
    def from_folder(cls, folder):
        """Read `folder`/config.json, in the spelling of transformers 4 or 5. Raises ValueError naming the field. The end ids of
        generation_config.json are checked too: with wrong ones an answer would never end."""
        path = Path(folder) / "config.json"
        raw = read_json(path, limit=4 << 20)

        def fail(name, why):
            found = f"is {show(raw[name], 80)}" if name in raw else "is missing"
            raise ValueError(f"{show(path, 160)}: {name} {found}; {why}")

        def size(name, default=REQUIRED, most=1 << 24):
            value = raw.get(name)
            value = default if value is None else value
            if type(value) is not int or not 0 < value <= most:                 # `type`: True is an int to isinstance
                fail(name, f"needs an integer from 1 to {most:,}")
            return value

        def flag(name, default=REQUIRED):
            value = raw.get(name)
            value = default if value is None else value
            return value if type(value) is bool else fail(name, "needs true or false")

        family, kinds = raw.get("model_type"), raw.get("architectures")
        if not isinstance(family, str) or family not in FAMILIES:
            fail("model_type", f"only {', '.join(FAMILIES)} are implemented")
        if kinds not in (None, [FAMILIES[family]]):
            fail("architectures", f"{family} is implemented as [{FAMILIES[family]!r}] only")
        if raw.get("hidden_act") not in ("silu", "swish"):                      # two names of one function
            fail("hidden_act", "only silu is implemented")
        if raw.get("quantization_config") is not None:
            fail("quantization_config", "quantised weights are not implemented; use the unquantised model")
        if raw.get("partial_rotary_factor") not in (None, 1) or raw.get("partial_rotary_factor") is True:
            fail("partial_rotary_factor", "only whole-head rotation (1.0) is implemented")

        layers, heads = size("num_hidden_layers", most=4096), size("num_attention_heads", most=1 << 14)
        width = size("hidden_size", most=1 << 20)
        # Where the family's papers fix a value the file may leave it out; what they do not fix is never guessed.
        kv_heads = size("num_key_value_heads", heads if family == "llama" or "num_key_value_heads" in raw else REQUIRED)
        head_dim = size("head_dim", max(width // heads, 1) if family != "qwen3" else REQUIRED, most=1 << 14)
        if heads % kv_heads:
            fail("num_key_value_heads", f"must divide num_attention_heads {heads}")
        if raw.get("head_dim") is None and width % heads:
            fail("num_attention_heads", f"must divide hidden_size {width}, or config.json must give head_dim")
        if head_dim % 2:
            fail("head_dim", f"rotary embedding needs an even head size, this one is {head_dim}")

        # A window hides old tokens from layers >= max_window_layers: harmless only if no layer is one of those.
        kinds = raw.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * layers:
            fail("layer_types", "only full_attention, once for every layer, is implemented")
        if flag("use_sliding_window", False) and kinds is None and raw.get("sliding_window") is not None \
                and size("max_window_layers", 0) < layers:
            fail("use_sliding_window", "sliding-window attention is not implemented")

        for name in ("sliding_window", "max_window_layers"):
            if type(raw.get(name)) not in (int, type(None)):
                fail(name, "needs an integer or null")
        for name in ("bos_token_id", "pad_token_id"):                           # not used here; some folders list several
            if type(raw.get(name)) not in (int, list, type(None)):
                fail(name, "needs an id or null")
        vocab_size = size("vocab_size")
        token_ids(path, raw, "eos_token_id", vocab_size)
        other = path.with_name("generation_config.json")
        if os.path.lexists(other):
            token_ids(other, read_json(other, limit=4 << 20), "eos_token_id", vocab_size)

        eps = raw.get("rms_norm_eps")
        if type(eps) not in (int, float) or not 0 < eps < 1:
            fail("rms_norm_eps", "needs a number between 0 and 1")
        dtype = raw.get("dtype") if raw.get("dtype") is not None else raw.get("torch_dtype")
        dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
        if dtype not in (None, "float64", *DTYPES):
            fail("dtype" if raw.get("dtype") is not None else "torch_dtype", f"implemented are {', '.join(DTYPES)}")
        bias = flag("attention_bias", False) if family != "qwen2" else False
        return cls(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=size("intermediate_size"),
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            max_position_embeddings=size("max_position_embeddings", most=1 << 30), rms_norm_eps=eps,
            tie_word_embeddings=flag("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or bias, o_bias=bias, mlp_bias=flag("mlp_bias", False) and family == "llama",
            qk_norm=family == "qwen3", rope=read_rope(path, raw), dtype=dtype)


def read_rope(path, raw):
    """The rotary parameters of config.json as one flat dict: `rope_parameters` (transformers 5), or `rope_theta` beside
    `rope_scaling` (transformers 4, where "type" may stand for "rope_type"). Raises ValueError naming the field."""
    def fail(name, why):
        value = rope.get(name, raw.get(name))
        found = "missing" if value is None else f"is {show(value, 80)}"
        raise ValueError(f"{show(path, 160)}: {name if name in raw else f'{place}.{name}'} {found}; {why}")

    def number(name, default=None, least=0.0):
        value = default if rope.get(name) is None else rope[name]
        if type(value) not in (int, float) or not least < value < 1e12:
            fail(name, f"needs a number above {least:g}")
        return value

    spellings = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name) not in (None, {})]
    place = spellings[0] if spellings else "rope_scaling"
    rope = raw[place] if spellings else {}
    if not isinstance(rope, dict) or any(raw[name] != rope for name in spellings):
        rope = {}
        fail(place, "needs one object of rotary parameters")
    for name in ("rope_theta", "original_max_position_embeddings"):             # may stand beside the object or in it
        if raw.get(name) is not None and rope.get(name, raw[name]) != raw[name]:
            fail(name, f"{place} says {show(rope[name])}; make them agree")
        rope = {name: raw.get(name)} | rope
    default = "default" if "factor" not in rope else None
    kind = next((rope[name] for name in ("rope_type", "type") if rope.get(name) is not None), default)
    if kind not in ("default", "linear", "llama3", "yarn"):
        rope = {"rope_type": kind}
        fail("rope_type", "implemented are default, linear, llama3, yarn")
    for name in ("partial_rotary_factor", "mrope_section"):
        if rope.get(name) not in (None, 1) or rope.get(name) is True:
            fail(name, "not implemented")
    # Llama 2 was published before the field existed and means 10,000. For the others a missing base would be a guess.
    old_llama = raw["model_type"] == "llama" and kind in ("default", "linear")
    found = {"rope_type": kind, "rope_theta": number("rope_theta", 10000.0 if old_llama else None, least=1.0)}
    if kind != "default":
        found["factor"] = number("factor")
    if kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = number("original_max_position_embeddings")
    if kind == "llama3":
        found["low_freq_factor"] = low = number("low_freq_factor")
        found["high_freq_factor"] = number("high_freq_factor", least=low)
    if kind == "yarn":
        found |= {"beta_fast": number("beta_fast", 32), "beta_slow": number("beta_slow", 1)}
        found |= {k: number(k) for k in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(k) is not None}
        found["truncate"] = rope.get("truncate", True)
        if type(found["truncate"]) is not bool:
            fail("truncate", "needs true or false")
    return found
