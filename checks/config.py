"""What may be wrong with a config.json: every field that changes the mathematics is implemented or refused, none is guessed."""
import os
from pathlib import Path

from checks.files import read_json, show, token_ids

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = (None, "float64", "float32", "bfloat16", "float16")


def check_config(path, raw):
    """Raises ValueError naming the file and the field. The end ids of generation_config.json are
    checked too: with wrong ones an answer would never end."""
    check_family(path, raw)
    check_sizes(path, raw)
    check_windows(path, raw)
    check_rope(path, raw)
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if type(raw.get(name)) not in (bool, type(None)):
            fail(path, raw, name, "needs true or false")
    for name in ("bos_token_id", "pad_token_id"):               # not used here; some folders list several
        if type(raw.get(name)) not in (int, list, type(None)):
            fail(path, raw, name, "needs an id or null")
    for name in ("dtype", "torch_dtype"):
        value = raw.get(name)
        value = value.removeprefix("torch.") if isinstance(value, str) else value
        if value not in DTYPES:
            fail(path, raw, name, f"implemented are {', '.join(DTYPES[1:])}")
    token_ids(path, raw, "eos_token_id", raw["vocab_size"])
    other = Path(path).with_name("generation_config.json")
    if os.path.lexists(other):
        token_ids(other, read_json(other, limit=4 << 20), "eos_token_id", raw["vocab_size"])


def fail(path, raw, name, why):
    found = f"is {show(raw[name], 80)}" if name in raw else "is missing"
    raise ValueError(f"{show(Path(path), 160)}: {name} {found}; {why}")


def check_family(path, raw):
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        fail(path, raw, "model_type", f"only {', '.join(FAMILIES)} are implemented")
    if raw.get("architectures") not in (None, [FAMILIES[family]]):
        fail(path, raw, "architectures", f"{family} is implemented as [{FAMILIES[family]!r}] only")
    if raw.get("hidden_act") not in ("silu", "swish"):          # two names of one function
        fail(path, raw, "hidden_act", "only silu is implemented")
    if raw.get("quantization_config") is not None:
        fail(path, raw, "quantization_config",
             "quantised weights are not implemented; use the unquantised model")
    whole = raw.get("partial_rotary_factor")
    if whole not in (None, 1) or whole is True:
        fail(path, raw, "partial_rotary_factor", "only whole-head rotation (1.0) is implemented")


def check_sizes(path, raw):
    def size(name, default=None, most=1 << 24):
        value = default if raw.get(name) is None else raw[name]
        if type(value) is not int or not 0 < value <= most:     # `type`: True is an int to isinstance
            fail(path, raw, name, f"needs an integer from 1 to {most:,}")
        return value

    family = raw["model_type"]
    size("num_hidden_layers", most=4096)
    heads = size("num_attention_heads", most=1 << 14)
    width = size("hidden_size", most=1 << 20)
    # Where the family's papers fix a value the file may leave it out; what they do not fix is never guessed.
    may_miss = family == "llama" or "num_key_value_heads" in raw
    if heads % size("num_key_value_heads", heads if may_miss else None):
        fail(path, raw, "num_key_value_heads", f"must divide num_attention_heads {heads}")
    head_dim = size("head_dim", max(width // heads, 1) if family != "qwen3" else None, most=1 << 14)
    if raw.get("head_dim") is None and width % heads:
        fail(path, raw, "num_attention_heads",
             f"must divide hidden_size {width}, or config.json must give head_dim")
    if head_dim % 2:
        fail(path, raw, "head_dim", f"rotary embedding needs an even head size, this one is {head_dim}")
    size("vocab_size")
    size("intermediate_size")
    size("max_position_embeddings", most=1 << 30)
    eps = raw.get("rms_norm_eps")
    if type(eps) not in (int, float) or not 0 < eps < 1:
        fail(path, raw, "rms_norm_eps", "needs a number between 0 and 1")


def check_windows(path, raw):
    """A window hides old tokens from layers >= max_window_layers: harmless only if no layer is one of those."""
    layers, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        fail(path, raw, "layer_types", "only full_attention, once for every layer, is implemented")
    for name in ("sliding_window", "max_window_layers"):
        if type(raw.get(name)) not in (int, type(None)):
            fail(path, raw, name, "needs an integer or null")
    in_use = raw.get("use_sliding_window")
    if type(in_use) not in (bool, type(None)):
        fail(path, raw, "use_sliding_window", "needs true or false")
    if in_use and kinds is None and raw.get("sliding_window") is not None:
        first = raw.get("max_window_layers")
        if first is None or first <= 0:
            fail(path, raw, "max_window_layers", "needs an integer from 1 to 16,777,216")
        if first < layers:
            fail(path, raw, "use_sliding_window", "sliding-window attention is not implemented")


def check_rope(path, raw):
    """The rotary parameters, in either spelling: see load_weights.read_rope."""
    spellings = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name) not in (None, {})]
    place = spellings[0] if spellings else "rope_scaling"
    rope = raw[place] if spellings else {}
    if not isinstance(rope, dict) or any(raw[name] != rope for name in spellings):
        fail(path, raw, place, "needs one object of rotary parameters")
    for name in ("rope_theta", "original_max_position_embeddings"):     # beside the object or in it
        if raw.get(name) is not None and rope.get(name, raw[name]) != raw[name]:
            fail(path, raw, name, f"{place} says {show(rope[name])}; make them agree")
    rope = {"rope_theta": raw.get("rope_theta"), **rope}
    if rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = raw.get("original_max_position_embeddings")

    def wrong(name, why):
        value = rope.get(name)
        found = "is missing" if value is None else f"is {show(value, 80)}"
        raise ValueError(f"{show(Path(path), 160)}: {name if name in raw else f'{place}.{name}'} {found}; {why}")

    def number(name, default=None, least=0.0):
        value = default if rope.get(name) is None else rope[name]
        if type(value) not in (int, float) or not least < value < 1e12:
            wrong(name, f"needs a number above {least:g}")
        return value

    kind = rope.get("rope_type") if rope.get("rope_type") is not None else rope.get("type")
    rope["rope_type"] = "default" if kind is None and "factor" not in rope else kind
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        wrong("rope_type", "implemented are default, linear, llama3, yarn")
    for name in ("partial_rotary_factor", "mrope_section"):
        if rope.get(name) not in (None, 1) or rope.get(name) is True:
            wrong(name, "not implemented")
    # Llama 2 was published before the field existed and means 10,000. For the others a missing base would be a guess.
    old_llama = raw["model_type"] == "llama" and rope["rope_type"] in ("default", "linear")
    number("rope_theta", 10000.0 if old_llama else None, least=1.0)
    if rope["rope_type"] != "default":
        number("factor")
    if rope["rope_type"] in ("llama3", "yarn"):
        number("original_max_position_embeddings")
    if rope["rope_type"] == "llama3":
        number("high_freq_factor", least=number("low_freq_factor"))
    if rope["rope_type"] == "yarn":
        for name, default in (("beta_fast", 32), ("beta_slow", 1)):
            number(name, default)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if rope.get(name) is not None:
                number(name)
        if type(rope.get("truncate", True)) is not bool:
            wrong("truncate", "needs true or false")
