"""y = x Wᵀ, and what it takes to do that at the machine's speed on a CPU.

A reader of the model needs the class only: it is F.linear. The functions below it are the one place where the project
works around torch's choice of kernels; benchmark.py shows what they bring. On a GPU every product of the model is F.linear.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Module):
    """y = x Wᵀ (+ b), as nn.Linear, but left without initial values: they come from a file (or from tiny/train.py)."""
    words = None                                # the weight as `one_row_compiled` reads it, set by compiled.py

    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        weight, bias, (*shape, inputs) = self.weight, self.bias, x.shape
        rows = x.reshape(-1, inputs)            # flat: of a slice like hidden[:, :-1] torch would copy W first, once a sample
        if self.words is not None and len(rows) == 1 and torch.compiler.is_compiling():
            y = one_row_compiled(rows, self.words, bias)
        else:
            y = (linear_cpu if x.is_cpu else F.linear)(rows, weight, bias)
        return y.view(*shape, len(weight))


# Whether this CPU multiplies matrices of the dtype in hardware (AVX-512 BF16, AMX); most laptops do not.
NATIVE_GEMM = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
               torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported()}
PARTS = 8               # a product in so many parts keeps so many cores busy


def linear_cpu(x, weight, bias):
    """F.linear on a CPU, for x (rows, inputs), where torch's own choice of kernel is far from the machine's limits.

    One row: decoding, and SLOT's W δ. Reading the weight is all the work; `one_row`.
    Many rows (prefill) in float32: torch asks MKL, oneDNN is faster; `many_rows`. In 16 bits without hardware support, a product
    runs 5 to 10 times slower than one in float32. So float32 it is, without a second copy of W; `by_way_of_float32`.
    F.linear serves the rest: 2 to 4 rows of 16 bits, training, and 16 bits on hardware that multiplies them.
    """
    rows = len(x)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)):
        return OneRow.apply(x, weight, bias) if rows == 1 and not weight.requires_grad else F.linear(x, weight, bias)
    if rows == 1:
        return one_row(x, weight, bias)
    if x.dtype == torch.float32:
        return many_rows(x, weight, bias)
    if rows <= 4 or NATIVE_GEMM.get(x.dtype, True):
        return F.linear(x, weight, bias)
    return by_way_of_float32(x, weight, bias, x.dtype)


# oneDNN's float32 product. torch has it for its compiler and does not take it for F.linear, which asks MKL: on an AMD processor
# that is 1.2 to 1.9 times slower. Not in every build of torch (Apple).
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def many_rows(x, weight, bias=None):
    """x Wᵀ (+ b) in float32, for x (rows, inputs) -> (rows, outputs)."""
    return ONEDNN(x, weight, bias, "none", [], "") if ONEDNN and len(x) else F.linear(x, weight, bias)


def product(x, weight):
    """x Wᵀ for many rows x (rows, inputs): SLOT's W h -> (rows, outputs) in float32, or in the 16 bits of x where the hardware
    multiplies such numbers and rounds each product to them, as in the model."""
    if not x.is_cpu or NATIVE_GEMM.get(x.dtype):
        return F.linear(x, weight)
    return many_rows(x, weight) if x.dtype == torch.float32 else by_way_of_float32(x, weight, None, torch.float32)


def by_way_of_float32(x, weight, bias, dtype):
    """x Wᵀ (+ b) for 16-bit numbers x (rows, inputs), multiplied in float32 -> (rows, outputs) of dtype, rounded once. A block of
    W at a time, so that its copy in float32 stays in the cache."""
    out = x.new_empty(len(x), len(weight), dtype=dtype)
    x, size = x.float(), max(64, (1 << 20) // x.shape[1])                   # rows of W that are 4 MB in float32
    block = x.new_empty(min(size, len(weight)), x.shape[1])
    for i in range(0, len(weight), size):
        part = weight[i:i + size]
        part = block[:len(part)].copy_(part)
        # oneDNN packs the right-hand matrix before it multiplies: that of x is the cheaper one up to some 512 rows
        y = many_rows(part, x).T if len(x) < 512 else many_rows(x, part)    # (rows, size)
        out[:, i:i + size] = y if bias is None else y.add_(bias[i:i + size])
    return out


def one_row(x, weight, bias=None):
    """x Wᵀ (+ b) for x (1, inputs) at memory speed -> (1, outputs).

    In float32 MKL may use one core only; as a batch of partial products it uses all. In 16 bits torch's own loop reads at memory
    speed, oneDNN, which F.linear prefers, at less than half of that; so oneDNN is switched off for the moment."""
    if x.dtype == torch.float32:
        outputs, inputs = weight.shape
        if outputs % PARTS or outputs * inputs < 1 << 16:           # a small matrix stays in the cache
            return F.linear(x, weight, bias)
        parts = weight.view(PARTS, -1, inputs)
        if inputs < 4096:
            y = torch.bmm(parts, x.T.expand(PARTS, inputs, 1)).view(1, outputs)
        else:                                                       # the same product, by a kernel that is kinder to a long x
            y = torch.bmm(x.expand(PARTS, 1, inputs), parts.transpose(1, 2)).view(1, outputs)
        return y if bias is None else y + bias
    return without_onednn(F.linear, x, weight, bias)


def weight_words(weight):
    """What `one_row_compiled` reads: of bfloat16 two neighbours as one 32-bit integer, (outputs, inputs/2), else W itself. No copy,
    unless W begins at an odd place in its file."""
    if weight.dtype != torch.bfloat16 or weight.shape[1] % 2:
        return weight.data
    return (weight.data if weight.storage_offset() % 2 == 0 else weight.data.clone()).view(torch.int32)


def one_row_compiled(x, words, bias):
    """`one_row` in a form that torch.compile turns into one loop over W (see compiled.py), computed and returned in float32
    -> (1, outputs).

    A bfloat16 number is the upper half of a float32. So of two neighbours in one 32-bit word, the first in its lower half
    (little-endian), shifting it up leaves the first, and masking it the second: a third of the instructions of a conversion, and
    with them the loop keeps up with memory.
    Where x is too long for the first cache, four rows of W at a time share what is read of it; in float32 that always pays."""
    x = x.float()
    parts = words.chunk(4 if words.dtype == torch.float32 or x.shape[1] >= 8192 else 1)
    if words.dtype == torch.int32:
        first, second = x[:, 0::2].contiguous(), x[:, 1::2].contiguous()
        rows = [(part << 16).view(torch.float32) * first + (part & -65536).view(torch.float32) * second for part in parts]
    else:
        rows = [part.float() * x for part in parts]
    y = torch.cat([row.sum(-1) for row in rows])
    return (y if bias is None else y + bias)[None]


def without_onednn(product, *factors):
    before = torch._C._get_mkldnn_enabled()                         # the public torch.backends.mkldnn.flags costs 20 times this
    torch._C._set_mkldnn_enabled(False)
    try:
        return product(*factors)
    finally:
        torch._C._set_mkldnn_enabled(before)


class OneRow(torch.autograd.Function):
    """`one_row` for autograd, with a gradient for x: what the readable loop of slot.py asks of a frozen head."""
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return one_row(x, weight, bias)

    @staticmethod
    def backward(ctx, r):
        return transposed_cpu(r, ctx.saved_tensors[0]).to(r.dtype), None, r[0] if ctx.needs_input_grad[2] else None


def transposed_cpu(r, weight):
    """r W for r (B, outputs) and weight (outputs, inputs) of one dtype, on a CPU -> (B, inputs) float32: the product that SLOT's
    gradient needs. torch runs a single one on one core and sums in the given dtype; as partial products, summed in float32, it
    uses all cores and comes near memory speed."""
    most = r.shape[1] - r.shape[1] % PARTS
    parts = weight[:most].view(PARTS, most // PARTS, weight.shape[1])                               # (8, outputs/8, inputs)
    if weight.dtype == torch.float32:
        sums = torch.bmm(r[:, :most].view(len(r), PARTS, most // PARTS).transpose(0, 1), parts).sum(0)         # (B, inputs)
    else:
        columns = r[:, :most].view(len(r), PARTS, most // PARTS, 1)
        sums = torch.stack([without_onednn(torch.bmm, parts.transpose(1, 2), column).float().sum(0)[:, 0] for column in columns])
    return sums + r[:, most:].float() @ weight[most:].float()
