"""Lesson I. The decoder: norm, rotary embedding, attention, cache. See the same in model.py."""
import math

import torch
import torch.nn.functional as F

import model
import slot
from exercises.check import Exercise, Mistake
from exercises.program import answers_with, embedded, shades


def random(seed, *shape):
    """Numbers from a normal distribution, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- 1. RMSNorm

def rms_norm_loops(x, weight, eps):
    """The same for one vector, number by number."""
    mean_square = sum(value * value for value in x) / len(x)
    root = math.sqrt(mean_square + eps)
    return [scale * value / root for scale, value in zip(weight, x)]


def rms_norm(x, weight, eps):
    """Divide every vector by its root mean square, then scale each of its numbers.

    A decoder adds to the same vector in every layer, so the vector grows. Before each layer reads
    it, it is divided by its root mean square: only its direction is left, and a learned weight for
    each dimension says how loud that dimension is to be.

        y_i = weight_i * x_i / sqrt(mean_j(x_j²) + eps)

    Nothing is subtracted: this is what sets it apart from LayerNorm, and it works as well with
    less to compute. eps keeps a vector of zeros from being divided by zero. In a 16-bit model the
    squares would overflow (float16 ends at 65,504, and 300² is more), so the statistics and the
    division are made in float32. The quotient goes back to x's dtype, then the weight is applied.
    (The check sees that float16's squares are float32 and that x's dtype comes back. Where float32
    ends, before the division, after it or after the weight, changes only the last digits of 16
    bits: that it does not see.)

    x        (..., d)   any number of dimensions before the last; float32, float16 or bfloat16
    weight   (d,)       of the same dtype
    eps      a number
    returns  the shape and the dtype of x

    By hand: x = (3, 4), weight = (1, 2), eps = 0. The mean square is (9 + 16) / 2 = 12.5, its root
    3.5355. Divided: (0.8485, 1.1314). Times the weight: (0.8485, 2.2627).

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([0.8485, 2.2627])

    Allowed: everything on tensors, such as x.float(), x.mean, torch.sqrt, torch.rsqrt.
    Not allowed: torch's own norm (nn.RMSNorm, F.rms_norm). Loops are not needed.

    To think about: x is multiplied by 10. What happens to y? And what, then, can a layer not know
    of its input?
    """
    x32 = x.float()
    mean_square = x32.pow(2).mean(-1, keepdim=True)             # (..., 1)
    x32 = x32 * torch.rsqrt(mean_square + eps)
    return weight * x32.to(x.dtype)


def rms_norm_cases():
    x, weight = random(1, 2, 3, 5) + 0.5, random(2, 5)
    return {
        "the example by hand": (torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0),
        "two samples of three tokens": (x, weight, 0.25),
        "a vector of zeros": (torch.zeros(1, 4), torch.ones(4), 1e-3),
        "float16, numbers near 300": ((300 + 50 * x).half(), weight.half(), 1e-6),
    }


def rms_norm_reward(rms_norm):
    lm, _, prompt = embedded()
    lines = ["root mean square of the last prompt token, before and after your norm:"]
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
             for layer in lm.model.layers]
    lm.model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    for number, x in enumerate(seen):
        norm = lm.model.layers[number].input_layernorm
        before = x[0, -1].pow(2).mean().sqrt().item()
        bare = rms_norm(x[0, -1], torch.ones_like(norm.weight), norm.eps).pow(2).mean().sqrt()
        after = rms_norm(x[0, -1], norm.weight, norm.eps).pow(2).mean().sqrt().item()
        lines.append(f"layer {number}   {before:5.2f} {'█' * round(6 * before):<30}"
                     f"norm {bare:.2f}, with its weight {after:.2f}")
    return "\n".join(lines)


def rms_norm_trial(rms_norm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

    return answers_with((model.RMSNorm, "forward", forward))


RMS_NORM = Exercise(
    title="RMSNorm", minutes=20, level="easy",
    solution=rms_norm, loops=rms_norm_loops, cases=rms_norm_cases,
    reward=rms_norm_reward, trial=rms_norm_trial, forbidden=("RMSNorm", "rms_norm", "layer_norm"),
    mistakes=[
        Mistake("the mean is subtracted",
                "That is LayerNorm. RMSNorm moves nothing, it only divides.",
                {"x32 = x.float()": "x32 = x.float() - x.float().mean(-1, keepdim=True)"}),
        Mistake("the mean instead of the mean square",
                "The numbers were averaged and the average squared. Squares are averaged: "
                "otherwise numbers of opposite sign cancel, and the vector seems short.",
                {"x32.pow(2).mean(-1, keepdim=True)": "x32.mean(-1, keepdim=True).pow(2)"}),
        Mistake("sum instead of mean",
                "This makes the vector's length 1. The mean makes its typical number 1, whatever "
                "d.",
                {".mean(-1": ".sum(-1"}),
        Mistake("the root is forgotten",
                "Divided by the mean square itself. Try x = (3, 4) by hand: 12.5 is no length.",
                {"torch.rsqrt(mean_square + eps)": "(1 / (mean_square + eps))"}),
        Mistake("eps outside the root",
                "sqrt(mean square) + eps. The formula adds eps before the root is taken.",
                {"torch.rsqrt(mean_square + eps)": "(1 / (mean_square.sqrt() + eps))"}),
        Mistake("eps is forgotten",
                "A vector of zeros is then divided by zero.",
                {"mean_square + eps": "mean_square"}),
        Mistake("statistics in the model's dtype",
                "The squares of a float16 tensor overflow above 255, the mean is infinite, and the "
                "quotient 0. They need float32.",
                {"x32 = x.float()": "x32 = x"}),
        Mistake("x is changed in place",
                "x.float() of a float32 tensor is x itself, no copy. `x32 *= ...` then writes into "
                "the sum that runs past the layers.",
                {"x32 = x32 * torch": "x32 *= torch"}),
        Mistake("the weight is forgotten",
                "The last step scales every dimension by its learned weight.",
                {"return weight * x32": "return x32"}),
        Mistake("one plus the weight",
                "Gemma stores weight - 1 and so adds 1. Llama and Qwen store the weight itself.",
                {"return weight *": "return (1 + weight) *"}),
        Mistake("the result is left in float32",
                "The next layer expects the dtype that came in.",
                {"x32.to(x.dtype)": "x32"}),
        Mistake("the mean lost its dimension",
                "x is (..., d), but its mean without keepdim is (...): the last dimension is "
                "gone, and the division pairs the wrong ones, or fails.",
                {".mean(-1, keepdim=True)": ".mean(-1)"}),
        Mistake("one mean for all tokens",
                "The mean was taken over the whole tensor, so tokens and samples change each "
                "other. Every vector, the last dimension, has a mean of its own.",
                {".mean(-1, keepdim=True)": ".mean()"}),
    ],
    hints=["Four steps: to float32; the mean of the squares over the last dimension; divide; back.",
           "mean(-1, keepdim=True) keeps the dimension, so that (..., d) / (..., 1) broadcasts.",
           "Where does the float32 end? After the division and before the weight: x.dtype knows."],
    answer="y stays as it is (up to eps): a layer cannot know how long its input vector is. "
           "Length is not lost to the model, though: the sum that runs past the layers keeps it, "
           "and a longer vector is turned less by what a layer adds.")


# ---- 2. rotary embedding

def rotate_loops(x, position, theta):
    """The same for one vector of D numbers at one position."""
    half = len(x) // 2
    turned = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


def rotate(x, positions, theta):
    """Turn a query or key by its position, so that their product knows the distance alone.

    Attention by itself does not know the order of tokens. Rotary embedding takes the D numbers of
    a head as D/2 points (a, b) of a plane and turns each by an angle that grows with the position:
    the first pair by 1 radian a token, the last ones very slowly, like the hands of a clock. If a
    query is turned by 9 and a key by 7, their product is that of a turn by 2: only the distance
    counts.

        angle_i = position * theta^(-2i/D)                i = 0 .. D/2 - 1
        (a, b)  -> (a cos - b sin,  b cos + a sin)        a = x[i],  b = x[i + D/2]

    Which two numbers make a pair is a matter of layout. The paper pairs neighbours (0 with 1, 2
    with 3). The checkpoints that this project reads pair number i with number i + D/2, the first
    half with the second: the "half-rotated" layout. It is the one to build here. Angles are made
    in float32 also for a 16-bit x (bfloat16 knows no whole numbers between 256 and 258).

    x          (B, heads, T, D)   D is even; float32 or bfloat16
    positions  (B, T)             int64; the samples of a batch may stand at different positions
    theta      a number, such as 10000.0
    returns    the shape and the dtype of x

    By hand: D = 4, x = (1, 2, 3, 4), position 2, theta = 100. Pair 0 is (1, 3) and turns by 2
    radians: (1 cos 2 - 3 sin 2, 3 cos 2 + 1 sin 2) = (-3.144, -0.339). Pair 1 is (2, 4) and turns
    by 2 * 100^(-2/4) = 0.2: (1.165, 4.318). Put back: (-3.144, 1.165, -0.339, 4.318).

    >>> rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([[2]]), 100.0)
    tensor([[[[-3.1440,  1.1655, -0.3391,  4.3176]]]])

    Allowed: everything on tensors. Not allowed: nothing. Loops are not needed.

    To think about: q and k are rotated, v is not. Why?
    """
    D = x.shape[-1]
    speeds = theta ** (-torch.arange(0, D, 2) / D)              # (D/2,) radians a token
    angles = positions[:, None, :, None] * speeds               # (B, 1, T, D/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)                           # (B, heads, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotate_cases():
    far = torch.tensor([[3001, 777], [12, 4093]])
    return {
        "the example by hand": (torch.tensor([[[[1., 2., 3., 4.]]]]), torch.tensor([[2]]), 100.0),
        "two samples at their own positions": (random(3, 2, 3, 4, 6),
                                               torch.tensor([[0, 1, 2, 3], [7, 8, 9, 30]]), 50.0),
        "bfloat16, far from the beginning": (random(4, 2, 2, 2, 8).bfloat16(), far, 10000.0),
    }


def rotate_reward(rotate):
    q, k = random(5, 1, 1, 1, 32), random(6, 1, 1, 1, 32)
    lines = ["the product of one query and one key, each turned by your function:",
             "query at   key at   distance   product"]
    for start in (0, 100, 400):
        for distance in (0, 1, 5, 20):
            turned_q = rotate(q, torch.tensor([[start + distance]]), 10000.0)
            turned_k = rotate(k, torch.tensor([[start]]), 10000.0)
            product = (turned_q * turned_k).sum().item()
            lines.append(f"{start + distance:8} {start:8} {distance:10}   {product:+.4f}")
    return "\n".join(lines + ["only the distance counts"])


def rotate_trial(rotate):
    theta = embedded()[0].config.rope["rope_theta"]

    def positions_alone(self, positions):                       # in the place of cos and sin
        return positions, None

    def by_student(x, positions, _):
        return rotate(x, positions.expand(x.shape[0], -1), theta)

    return answers_with((model.RotaryEmbedding, "forward", positions_alone),
                        (model, "rotate", by_student))


ROTATE = Exercise(
    title="Rotary embedding", minutes=40, level="medium",
    solution=rotate, loops=rotate_loops, cases=rotate_cases,
    reward=rotate_reward, trial=rotate_trial,
    mistakes=[
        Mistake("neighbours are paired",
                "That is the layout of the paper: (0, 1), (2, 3), ... These checkpoints pair "
                "number i with number i + D/2.",
                {"x.float().chunk(2, dim=-1)": "x.float()[..., 0::2], x.float()[..., 1::2]",
                 "torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)":
                 "torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)"}),
        Mistake("neighbours are paired and put back as halves",
                "The pairs were read as (0, 1), (2, 3), ... and written as (0, D/2), (1, D/2 + 1). "
                "Both must be halves.",
                {"x.float().chunk(2, dim=-1)": "x.float()[..., 0::2], x.float()[..., 1::2]"}),
        Mistake("the angle's sign",
                "The pairs were turned the other way. Distances stay right, so a model made this "
                "way would learn; one that was trained the other way does not fit.",
                {"sin = angles.cos(), angles.sin()": "sin = angles.cos(), -angles.sin()"}),
        Mistake("both sines are added",
                "(a cos + b sin, b cos + a sin) is no rotation: it changes lengths. One is "
                "subtracted.",
                {"a * cos - b * sin": "a * cos + b * sin"}),
        Mistake("positions are one too high",
                "The first token stands at position 0, where nothing is turned. (All distances are "
                "right, which is why this one is hard to see in a model.)",
                {"positions[:, None, :, None]": "(positions[:, None, :, None] + 1)"}),
        Mistake("positions are counted anew",
                "0, 1, 2, ... was used whatever `positions` says. Behind a cache, tokens do not "
                "begin at 0.",
                {"positions[:, None, :, None]":
                 "torch.arange(x.shape[2]).expand(x.shape[0], -1)[:, None, :, None]"}),
        Mistake("the exponent lacks its 2",
                "theta^(-i/D): every pair turns at the root of its speed. The exponents run from 0 "
                "nearly to -1.",
                {"torch.arange(0, D, 2) / D": "torch.arange(0, D // 2) / D"}),
        Mistake("the exponent's sign",
                "theta^(+2i/D): the later pairs turn faster and faster, by thousands of radians.",
                {"theta ** (-torch": "theta ** (torch"}),
        Mistake("sine and cosine are exchanged",
                "At position 0 nothing may turn: the factor of x itself is the cosine.",
                {"cos, sin = angles.cos()": "sin, cos = angles.cos()"}),
        Mistake("angles in the model's dtype",
                "In bfloat16 position 3001 is 3008: seven radians for the first pair.",
                {"positions[:, None, :, None] * speeds":
                 "(positions[:, None, :, None].to(x.dtype) * speeds.to(x.dtype)).float()"}),
        Mistake("the result is left in float32",
                "Attention expects q and k in the dtype of v.",
                {".to(x.dtype)": ""}),
    ],
    hints=["Make the D/2 speeds first, then the angles: a product of positions (B, 1, T, 1) and "
           "speeds (D/2,) broadcasts to (B, 1, T, D/2).",
           "x.chunk(2, dim=-1) gives the two halves: all a's and all b's at once.",
           "Compute both new halves, then torch.cat((first, second), dim=-1). Float32 up to here."],
    answer="Positions matter for who looks at whom, which is the product of q and k. What is then "
           "handed over, v, should be the same word wherever it stands; turned by its position, it "
           "would have to be turned back by every reader.")


# ---- 3. causal attention

def attention_loops(q, k, v):
    """The same for one sample: q[head][query], k[group][key], v[group][key] are vectors."""
    H, K, T, S = len(q), len(k), len(q[0]), len(k[0])
    out = []
    for head in range(H):
        group = head // (H // K)
        rows = []
        for t in range(T):
            sees = range(S - T + t + 1)                         # all keys up to its own position
            scores = [sum(a * b for a, b in zip(q[head][t], k[group][s])) for s in sees]
            scores = [score / math.sqrt(len(q[head][t])) for score in scores]
            exps = [math.exp(score - max(scores)) for score in scores]
            rows.append([sum(e * v[group][s][i] for e, s in zip(exps, sees)) / sum(exps)
                         for i in range(len(v[group][0]))])
        out.append(rows)
    return out


def attention(q, k, v):
    """What every token gathers from those before it and from itself.

    A query is compared with every key by their product; softmax makes weights of the products, and
    the output is the mean of the values by these weights. Divided by sqrt(D), the products stay
    near 1 whatever D is, and softmax stays soft. A token must not see what comes after it: scores
    of later keys become minus infinity, so that their weight is exactly 0 and the others sum to 1.

        out_t = Σ_s softmax_s(q_t · k_s / sqrt(D)) v_s            s ≤ position of t

    Two things make it a real decoder's. Grouped heads: H query heads share K key/value heads, the
    first H/K of them the first, the next H/K the second, and so on; the cache is H/K times smaller.
    And a filled cache: the S keys are all tokens so far, the T queries only the last T of them. So
    query 0 stands at position S - T and sees S - T + 1 keys.

    q        (B, H, T, D)
    k, v     (B, K, S, D)     S ≥ T; H is a multiple of K
    returns  (B, H, T, D)

    By hand: D = 1, H = K = 1. One query q = 2 behind a cache of one: keys (0, ln 3), values (4, 8).
    Scores 0 and 2 ln 3 = ln 9, weights 1/10 and 9/10, output 0.4 + 7.2 = 7.6.

    >>> k = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    >>> attention(torch.tensor(2.0).view(1, 1, 1, 1), k, torch.tensor([4.0, 8.0]).view(1, 1, 2, 1))
    tensor([[[[7.6000]]]])

    Allowed: everything on tensors, softmax too.
    Not allowed: F.scaled_dot_product_attention, nn.MultiheadAttention. Loops are not needed.

    To think about: with the identity matrix for v (S = D), what is the output?
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    q = q.reshape(B, K, H // K, T, D)                           # neighbouring heads share a group
    scores = q @ k[:, :, None].transpose(-2, -1) / math.sqrt(D)         # (B, K, H/K, T, S)
    queries = torch.arange(S - T, S)[:, None]                   # (T, 1) positions
    keys = torch.arange(S)                                      # (S,)
    scores = scores.masked_fill(keys > queries, -math.inf)
    weights = scores.softmax(-1)
    return (weights @ v[:, :, None]).reshape(B, H, T, D)


def attention_cases():
    keys = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    return {
        "the example by hand": (torch.tensor(2.0).view(1, 1, 1, 1), keys,
                                torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)),
        "an empty cache": (random(7, 1, 2, 5, 4), random(8, 1, 2, 5, 4), random(9, 1, 2, 5, 4)),
        "6 heads on 2, 3 tokens behind 4": (random(10, 2, 6, 3, 5), random(11, 2, 2, 7, 5),
                                            random(12, 2, 2, 7, 5)),
    }


def attention_reward(attention):
    lm, tokenizer, prompt = embedded()
    seen = {}

    def watch(q, k, v, **options):
        seen[len(seen)] = q, k
        return real(q, k, v, **options)

    real, F.scaled_dot_product_attention = F.scaled_dot_product_attention, watch
    try:
        lm.model(torch.tensor([prompt]))
    finally:
        F.scaled_dot_product_attention = real
    q, k = seen[1]
    D, T = q.shape[-1], min(q.shape[-1], len(prompt))      # v = identity: the output is the weights
    eye = torch.eye(D)[:T].expand(1, k.shape[1], T, D)
    weights = attention(q[:, :, :T], k[:, :, :T], eye)[0, 0, :, :T]
    lines = ["with v = identity your output is the weights: layer 1, head 0, who sees whom"]
    for id, row in zip(prompt, weights.tolist()):
        lines.append(f"{tokenizer.decode([id])!r:>12} {shades(row)}")
    return "\n".join(lines)


def attention_trial(attention):
    def by_student(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        if is_causal:
            return attention(q, k, v)
        B, K, _, D = q.shape                    # one token: its heads stand in the place of queries
        return attention(q.reshape(B, -1, 1, D), k, v).reshape(B, K, -1, D)

    return answers_with((F, "scaled_dot_product_attention", by_student))


ATTENTION = Exercise(
    title="Causal attention, grouped heads, a filled cache", minutes=60, level="hard",
    solution=attention, loops=attention_loops, cases=attention_cases,
    reward=attention_reward, trial=attention_trial,
    forbidden=("scaled_dot_product_attention", "MultiheadAttention"),
    mistakes=[
        Mistake("the triangle begins at the top left",
                "Query 0 sees key 0 alone. It stands at position S - T, behind the cache, and "
                "sees all keys of the cache and itself. Right only where the cache is empty.",
                {"torch.arange(S - T, S)": "torch.arange(T)"}),
        Mistake("heads are grouped as if dealt out",
                "Head h was given key/value head h % K. Neighbours share: head h has number h // "
                "(H/K).",
                {"q = q.reshape(B, K, H // K, T, D)":
                 "q = q.reshape(B, H // K, K, T, D).transpose(1, 2)",
                 "(weights @ v[:, :, None])":
                 "(weights @ v[:, :, None]).transpose(1, 2)"}),
        Mistake("scores are not scaled",
                "The division by sqrt(D) is missing: softmax is then too hard.",
                {" / math.sqrt(D)": ""}),
        Mistake("scores are divided by D",
                "By its root: a sum of D products of random numbers is about sqrt(D) large.",
                {"math.sqrt(D)": "D"}),
        Mistake("the mask comes after softmax",
                "Weights of later keys were set to 0 when softmax had already counted them, so "
                "the rest sums to less than 1.",
                {"scores = scores.masked_fill(keys > queries, -math.inf)": "",
                 "scores.softmax(-1)": "scores.softmax(-1).masked_fill(keys > queries, 0)"}),
        Mistake("later keys get score 0",
                "0 is an ordinary score: exp(0) = 1. Minus infinity makes the weight 0.",
                {"-math.inf": "0"}),
        Mistake("nothing is masked",
                "Every token sees the future: trained so, a model would copy instead of predict.",
                {"scores = scores.masked_fill(keys > queries, -math.inf)": ""}),
        Mistake("a token sees the next one",
                "One key too many: the mask begins behind the token that is to be predicted.",
                {"keys > queries": "keys > queries + 1"}),
        Mistake("a token does not see itself",
                "s < t instead of s ≤ t. The very first token then sees nothing, and 0/0 is NaN.",
                {"keys > queries": "keys >= queries"}),
        Mistake("the past is masked instead of the future",
                "The comparison is the wrong way round: keys *after* the query are hidden.",
                {"keys > queries": "keys < queries"}),
        Mistake("softmax over the queries",
                "The weights of every query sum to 1 over the keys: the last dimension.",
                {"softmax(-1)": "softmax(-2)"}),
    ],
    hints=["Give each query its group: q.reshape(B, K, H // K, T, D), and k a dimension of 1 "
           "there: k[:, :, None]. Matrix products broadcast.",
           "Write down the positions: keys stand at 0 .. S-1, queries at S-T .. S-1. The mask is "
           "one comparison of (S,) with (T, 1).",
           "masked_fill(hidden, -math.inf) before softmax(-1); at the end reshape to (B, H, T, "
           "D)."],
    answer="The weights themselves, (B, H, T, S): every output is a mean of unit vectors. It is "
           "how the picture after this exercise is made.")


# ---- 4. the KV cache

class Cache:
    """Keys and values of all tokens so far, in memory that was asked for once.

    Without a cache every new token would send the whole text through the decoder again. But keys
    and values of earlier tokens never change (no token sees a later one), so they are kept. A pass
    brings T new tokens through all layers; every layer writes its T keys and values behind those
    that are there and attends to all of them.

    `pos` says how many tokens are in. All layers of one pass write at the *same* place, so `pos`
    must stand still until the last layer has written, and then move by T. Hence two methods: the
    layers call `update`, and the decoder calls `advance(T)` once, at the end of the pass.

        before:  pos = 2       k[layer] = [k0 k1 __ __ __]
        update(layer, new k of 2 tokens)  [k0 k1 k2 k3 __]      returns [k0 k1 k2 k3]
        advance(2):  pos = 4

    Cache(layers, B, K, max_len, D)    makes k and v of shape (layers, B, K, max_len, D), and pos 0
    update(layer, k, v)                k, v (B, K, T, D) -> all keys and all values so far of this
                                       layer, each (B, K, pos + T, D): views of the memory that was
                                       made in __init__, not copies. ValueError if they do not fit.
    advance(T)                         the pass is over

    By hand: one layer, one head, D = 1, room for 4. Two tokens with keys 5, 6; then one with key 7.

    >>> cache, new = Cache(1, 1, 1, 4, 1), torch.tensor([5.0, 6.0]).view(1, 1, 2, 1)
    >>> k, v = cache.update(0, new, new)
    >>> cache.advance(2)
    >>> cache.update(0, new[:, :, :1] + 2, new[:, :, :1])[0].flatten()
    tensor([5., 6., 7.])

    Allowed: everything on tensors. Not allowed: torch.cat, which copies the whole cache at every
    token (n tokens: n² copies).

    To think about: after 100 tokens you want to try two continuations of the same text. What has to
    be copied, what has to be set back?
    """

    def __init__(self, layers, B, K, max_len, D):
        """Ask for all the memory, once."""
        self.k = torch.zeros(layers, B, K, max_len, D)
        self.v = torch.zeros(layers, B, K, max_len, D)
        self.pos = 0

    def update(self, layer, k, v):
        """Write k, v (B, K, T, D) of one layer at pos -> all of that layer, (B, K, pos + T, D)."""
        end = self.pos + k.shape[2]
        if end > self.k.shape[3]:
            raise ValueError(f"{end} tokens do not fit in {self.k.shape[3]}")
        self.k[layer, :, :, self.pos:end] = k
        self.v[layer, :, :, self.pos:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, T):
        """All layers have written T tokens."""
        self.pos += T


def cache_observe(Cache, layers, room, chunks):
    """Random keys and values in chunks, through all layers: what comes back, and from where."""
    B, K, D = 2, 3, 4
    cache = Cache(layers, B, K, room, D)
    returned, positions, moved = [], [], False
    places = {}                                                 # layer: where keys and values lie
    for number, T in enumerate(chunks):
        for layer in range(layers):
            new_k, new_v = random(100 * number + layer, 2, B, K, T, D)
            try:
                k, v = cache.update(layer, new_k, new_v)
            except ValueError:
                full = f"ValueError at {sum(chunks[:number + 1])} of {room}"
                return returned, positions, not moved, full
            returned.append((k.clone(), v.clone()))
            place = [each.untyped_storage().data_ptr() for each in (k, v)]
            moved = moved or places.setdefault(layer, place) != place
        cache.advance(T)
        positions.append(cache.pos)
    try:
        cache.update(0, *random(1, 2, B, K, room + 1 - sum(chunks), D))
        full = "nothing is said"
    except ValueError:
        full = "ValueError at one more than fit"
    except Exception as error:
        full = f"{type(error).__name__} at one more than fit"
    return returned, positions, not moved, full


def cache_cases():
    return {"two layers, 3 tokens": (2, 5, [3]),
            "two layers, 3 tokens, then 1, then 2": (2, 8, [3, 1, 2]),
            "filled to the last place": (1, 4, [2, 2])}


def cache_reward(Cache):
    lm, _, prompt = embedded()
    config, T = lm.config, len(prompt)
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = Cache(config.num_hidden_layers, 1, config.num_key_value_heads, T + 40, config.head_dim)
    lines = [f"the embedded model keeps {size} numbers a token; the default prompt has {T} tokens"]
    for T in (T, 1, 1, 1):
        for layer in range(config.num_hidden_layers):
            new = torch.zeros(1, config.num_key_value_heads, T, config.head_dim)
            cache.update(layer, new, new)
        cache.advance(T)
        lines.append(f"pos {cache.pos:3}  {'█' * cache.pos}{'░' * (len(prompt) + 40 - cache.pos)}")
    words = sum(range(len(prompt) + 1, len(prompt) + 41))
    return "\n".join(lines + [f"40 new tokens: {len(prompt) + 40} tokens go through the decoder; "
                              f"without a cache {len(prompt) + words:,}"])


def cache_trial(Cache):
    class InModel:
        """The student's cache with the names that model.py uses."""
        mask = None

        def __init__(self, config, batch_size, max_len, device, dtype):
            self.cache = Cache(config.num_hidden_layers, batch_size, config.num_key_value_heads,
                               max_len, config.head_dim)
            self.max_len, self.update = max_len, self.cache.update

        @property
        def pos(self):
            return self.cache.pos

        @pos.setter
        def pos(self, new):                                     # the decoder says pos = past + T
            self.cache.advance(new - self.cache.pos)

    return answers_with((slot, "KVCache", InModel))


CACHE = Exercise(
    title="The KV cache, and where its position moves", minutes=40, level="medium",
    solution=Cache, cases=cache_cases, observe=cache_observe,
    parts=("what update returned", "pos after every pass", "the memory stays where it is",
           "a full cache"),
    reward=cache_reward, trial=cache_trial, forbidden=("cat", "concat", "concatenate"),
    mistakes=[
        Mistake("pos moves in every layer",
                "`update` moved pos, so the second layer wrote behind the place of the first. All "
                "layers of a pass write at the same place.",
                {"return self.k[layer":
                 "self.pos = end; return self.k[layer",
                 "self.pos += T":
                 "pass"}),
        Mistake("pos moves in every layer and at the end",
                "Both `update` and `advance` moved pos. Only `advance` does, once for a pass.",
                {"return self.k[layer": "self.pos = end; return self.k[layer"}),
        Mistake("pos never moves",
                "The second pass overwrites the first.",
                {"self.pos += T": "pass"}),
        Mistake("pos moves by one",
                "Right for decoding, where a pass is one token. A prompt is many: pos moves by T.",
                {"self.pos += T": "self.pos += 1"}),
        Mistake("the whole memory is returned",
                "Attention would see the empty places too: keys of zeros get weights like any "
                "others.",
                {"return self.k[layer, :, :, :end], self.v[layer, :, :, :end]":
                 "return self.k[layer], self.v[layer]"}),
        Mistake("only the new tokens are returned",
                "Then nothing of the past is seen: the queries attend to all S keys.",
                {"return self.k[layer, :, :, :end], self.v[layer, :, :, :end]":
                 "return self.k[layer, :, :, self.pos:end], self.v[layer, :, :, self.pos:end]"}),
        Mistake("all layers share one store",
                "Every layer has keys of its own; the last to write must not overwrite the others.",
                {"end = self.pos": "layer, end = 0, self.pos"}),
        Mistake("values are written as keys",
                "The same tensor went into both stores.",
                {"self.pos:end] = v": "self.pos:end] = k"}),
        Mistake("the past is copied at every call",
                "What comes back is right, but in new memory each time: n tokens cost n² copies. "
                "Return a view of the memory that __init__ made.",
                {"return self.k[layer, :, :, :end], self.v[layer, :, :, :end]":
                 "return self.k[layer, :, :, :end].clone(), self.v[layer, :, :, :end].clone()"}),
        Mistake("a full cache is left to torch",
                "The assignment fails, with a message about sizes that helps nobody. Say it "
                "yourself: ValueError, before anything is written.",
                {"if end > self.k.shape[3]": "if False"}),
        Mistake("the last place is never used",
                "A cache for max_len tokens takes max_len tokens: only more than that does not "
                "fit.",
                {"if end > self.k.shape[3]": "if end >= self.k.shape[3]"}),
    ],
    hints=["The whole state: two tensors of shape (layers, B, K, max_len, D) and one number.",
           "A slice can be assigned to: self.k[layer, :, :, begin:end] = k. The same slice from 0 "
           "is the view to return.",
           "Only `advance` touches pos, and it is called once a pass; `update` only reads it."],
    answer="If both continuations are written one after the other, nothing has to be copied: set "
           "pos back to 100, and the second overwrites the first one's places before reading "
           "them. This is how generate.py --compare uses one prefill for two answers. At the same "
           "time, they need a copy of the 100 tokens, or two rows of a batch.")


EXERCISES = [RMS_NORM, ROTATE, ATTENTION, CACHE]
