"""What a GGUF file says -> what a model folder says: config.json, weights, tokenizer.json.

llama.cpp has its own names, and reorders the rows of q and k in Llama models, since it rotates
neighbours (0, 1), (2, 3), … where the checkpoint rotates halves (0, D/2), (1, D/2 + 1), …
"""
import numpy as np
import torch

from tokenizer.bpe import LLAMA3, QWEN2

NAMES = {           # of modules: llama.cpp's -> the checkpoint's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FIELDS = {          # the file's, after "llama." -> config.json's
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.key_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# How text is cut: tokenizer.ggml.pre -> the steps that the publishers' tokenizer.json has.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LLAMA_CUT, QWEN_CUT = ([SPLIT | {"pattern": {"Regex": cut}}, BYTES | {"use_regex": False}]
                       for cut in (LLAMA3, QWEN2))
CUTS = {"gpt-2": [BYTES], "smollm": [DIGITS, BYTES], "llama-bpe": LLAMA_CUT, "qwen2": QWEN_CUT,
        "deepseek-r1-qwen": QWEN_CUT}

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4             # types of tokens; the others are no text
ENDS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}


def config_of(fields, tensors, dtype):
    """-> config.json"""
    family = fields["general.architecture"]
    config = {
        "model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"],
        "hidden_act": "silu", "torch_dtype": dtype,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    for name, ours in FIELDS.items():
        value = fields.get(f"{family}.{name}")
        if isinstance(value, float):    # float32 in the file: 1e-05 has become 9.99999975e-06
            value = float(str(np.float32(value)))
        if value is not None:           # head_dim may be absent; null is nothing transformers reads
            config[ours] = value
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = llama3_scaling(tensors["rope_freqs.weight"].data, config)
    return config


@np.errstate(all="ignore")
def llama3_scaling(slower, config):
    """-> rope_scaling. Llama 3.1 to 3.3 say only how much slower each pair turns, (D/2,)."""
    pairs, factor = np.arange(len(slower)) / len(slower), float(slower.max())
    turns = 8192 / (2 * np.pi) * config.get("rope_theta", 1e4) ** -pairs
    kept = ((turns - 1) / 3).clip(0, 1)
    if not np.allclose(slower, 1 / (kept + (1 - kept) / factor), rtol=1e-4):
        raise ValueError("tensor rope_freqs.weight is not that of Llama 3.1, 3.2 or 3.3")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@np.errstate(all="ignore")
def weight_of(tensor, family, config, dtype):
    """A tensor of the file -> the checkpoint's name, the torch tensor in `dtype`."""
    from gguf.quants import dequantize              # blocks of few bits with a scale -> float32
    *layer, module, end = tensor.name.split(".")
    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if family == "llama" and module in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if module == "attn_q" else config.num_key_value_heads
        # Rows as neighbours (heads, D/2, 2, ...) -> as halves (heads, 2, D/2, ...).
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[module]}.{end}", torch.from_numpy(values).to(dtype)


def begin_with(text, id):
    """-> the step of tokenizer.json that puts a token before every text."""
    single = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}}}


def tokenizer_of(fields):
    """-> {name of a file: what belongs into it}"""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    texts, kinds, pre = own["tokens"], own["token_type"], own["pre"]

    # Added tokens stand in the vocabulary, too, where ordinary ones follow, as publishers do it.
    last = max((id for id, kind in enumerate(kinds) if kind == NORMAL), default=0)
    added = {id: texts[id] for id, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}
    vocab = {text: id for id, text in enumerate(texts)
             if kinds[id] == NORMAL or id in added and id < last}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = [{"id": id, "content": text, "special": kinds[id] == CONTROL, **flags}
               for id, text in added.items()]
    tokenizer = {
        "version": "1.0", "added_tokens": entries, "decoder": BYTES,
        "normalizer": {"type": "NFC"} if "qwen" in pre else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[pre]},
        "model": {"type": "BPE", "vocab": vocab, "merges": own["merges"],
                  "ignore_merges": pre == "llama-bpe"}}
    bos, eos, pad, eot, eom = (own.get(f"{name}_token_id")
                               for name in ("bos", "eos", "padding", "eot", "eom"))
    begins = own.get("add_bos_token", pre == "llama-bpe")
    if begins and bos in added:         # what transformers reads; add_bos_token alone does nothing
        tokenizer["post_processor"] = begin_with(added[bos], bos)
    settings = {
        "bos_token": added.get(bos), "eos_token": added.get(eos), "pad_token": added.get(pad),
        "add_bos_token": begins,
        "chat_template": fields.get("tokenizer.chat_template"),
        "tokenizer_class": "PreTrainedTokenizerFast"}
    ends = {eos, eot, eom, *(id for id in added if added[id] in ENDS)} - {None}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings,
            "generation_config.json": {"eos_token_id": sorted(ends)}}
