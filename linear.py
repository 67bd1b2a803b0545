"""y = x Wᵀ, and what it takes to do that at the machine's speed with 16-bit weights on a CPU.

A reader of the model needs the class only: it is F.linear. The two functions below it are the one place where the project
works around torch's choice of kernels; benchmark.py shows what they bring. On GPUs, and in float32, none of it is used.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Module):
    """y = x Wᵀ (+ b), as nn.Linear, but left without initial values: they come from a file (or from tiny/train.py)."""
    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        x = x.contiguous()          # a strided batch, hidden[:, -1:], makes torch copy the whole weight for each of its rows
        if x.is_cpu and x.dtype in NATIVE_GEMM:
            return linear_16bit_cpu(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


# Whether this CPU multiplies matrices of the dtype in hardware (AVX-512 BF16, AMX); most laptops do not.
NATIVE_GEMM = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
               torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported()}


def linear_16bit_cpu(x, weight, bias):
    """F.linear for 16-bit weights on a CPU, where torch's own choice of kernel is far from the machine's limits.

    One row (decoding): reading the weight is all the work. torch's own loop does it at memory speed, oneDNN, which F.linear
    prefers, at less than half of that; so oneDNN is switched off for the moment.
    Many rows (prefill) without hardware support: a 16-bit product runs 5 to 10 times slower than one in float32. So float32
    it is, a block of the weight at a time: the block stays in the processor's cache, and no second copy of W is made.
    """
    rows = x.numel() // x.shape[-1]
    if rows == 1:
        before = torch._C._get_mkldnn_enabled()                 # the public torch.backends.mkldnn.flags costs 20 times this
        torch._C._set_mkldnn_enabled(False)
        try:
            return F.linear(x, weight, bias)
        finally:
            torch._C._set_mkldnn_enabled(before)
    if rows <= 16 or NATIVE_GEMM[x.dtype] or (x.requires_grad and torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).float().T.contiguous()        # (inputs, rows)
    out = x.new_empty(len(weight), rows, dtype=torch.float32)   # (outputs, rows): each block fills whole rows of it
    block = x.new_empty(1024, weight.shape[1], dtype=torch.float32)
    for i in range(0, len(weight), 1024):
        part = weight[i:i + 1024]
        torch.mm(block[:len(part)].copy_(part), columns, out=out[i:i + 1024])
    if bias is not None:
        out += bias[:, None]
    return x.new_empty(rows, len(weight)).copy_(out.T).view(*x.shape[:-1], -1)


def transposed_16bit_cpu(r, weight):
    """r W for 16-bit r (B, outputs) and weight (outputs, inputs) on a CPU -> (B, inputs) float32: the product that SLOT's
    gradient needs. torch runs a single one on one core and sums in 16 bits; as eight partial products, summed in float32, it
    uses all cores and comes near memory speed."""
    B, V = r.shape
    most = V - V % 8
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        parts = weight[:most].view(8, most // 8, -1).transpose(1, 2)                                # (8, inputs, outputs/8)
        rows = [torch.bmm(parts, row[:most].view(8, most // 8, 1)).float().sum(0)[:, 0] for row in r]   # (inputs,) each
    finally:
        torch._C._set_mkldnn_enabled(before)
    return torch.stack(rows) + r[:, most:].float() @ weight[most:].float()
