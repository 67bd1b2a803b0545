"""A δ that was kept in a file (`--save-delta`): does it belong to this model?"""
import torch

from checks.files import show


def fingerprint(lm):
    """Some rows of the head, rounded to bfloat16, so that a model in float32 is the same model."""
    rows = lm.lm_head.weight[::max(1, lm.config.vocab_size // 16)]
    return rows.to(torch.bfloat16).cpu().contiguous()


def check_delta(path, kept, lm):
    """kept: the tensors of the file. ValueError if it was fitted to another model."""
    head = fingerprint(lm)
    if kept.keys() != {"delta", "head"}:
        raise ValueError(f"--delta {show(path, 160)}: is no file of --save-delta")
    same = kept["head"].dtype == head.dtype and torch.equal(kept["head"], head)
    right = kept["delta"].shape == (1, 1, lm.config.hidden_size)
    if not (same and right and kept["delta"].dtype == torch.float32):
        raise ValueError(f"--delta {show(path, 160)}: was fitted to another model, or to "
                         "this one in float16; fit one to this")
    if not kept["delta"].isfinite().all():
        raise ValueError(f"--delta {show(path, 160)}: holds what is no number; fit it anew")
