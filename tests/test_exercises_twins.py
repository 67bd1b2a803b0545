"""Where the project's own code is the solution of an exercise, both give the same on the exercise's cases.

Also run in a copy that was handed out: the project's own code is judged there by answers.pt.
"""
import torch
import torch.nn.functional as F

import load_weights
import model
import slot
from exercises.check import difference, right_results, run
from exercises.lessons import EXERCISES
from generate import sampler
from study.measure import Text, unigram
from study.scoring import strict
from study.stats import sign_test
from tokenizer.bpe import join
from tokenizer.text import Stream


def agree(number, twin, tolerance=None):
    """The project's function, called as the exercise's, on all its cases."""
    exercise = EXERCISES[number]
    results, error = run(exercise, twin)
    assert error is None, error
    words = difference(results, right_results(number, exercise), tolerance or exercise.tolerance)
    assert not words, words


def test_rms_norm():
    def twin(x, weight, eps):
        norm = model.RMSNorm(len(weight), eps)
        norm.weight.data = weight
        return norm(x)

    agree(1, twin)


def test_rotate():
    def twin(x, positions, theta):
        D = x.shape[-1]
        rotary = model.RotaryEmbedding.__new__(model.RotaryEmbedding)
        torch.nn.Module.__init__(rotary)
        rotary.inv_freq, rotary.scale = theta ** (-torch.arange(0, D, 2) / D), 1.0
        return model.rotate(x, *rotary(positions))

    agree(2, twin)


def identity_projections(config):
    """An Attention whose projections read q, k, v off an input that holds them side by side."""
    attention = model.Attention(config, 0)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    begin = 0
    for layer, size in ((attention.q_proj, H * D), (attention.k_proj, K * D), (attention.v_proj, K * D)):
        layer.weight.data = torch.eye(config.hidden_size)[begin:begin + size]
        begin += size
    attention.o_proj = torch.nn.Identity()
    return attention


def test_attention_behind_a_filled_cache():
    """The keys that are there go into the cache, the last T come by way of the layer's own projections."""
    def twin(q, k, v):
        (B, H, T, D), K, S = q.shape, k.shape[1], k.shape[2]
        fields = dict.fromkeys(model.Config.__dataclass_fields__)
        fields |= dict(num_attention_heads=H, num_key_value_heads=K, head_dim=D, hidden_size=(H + 2 * K) * D,
                       num_hidden_layers=1, qkv_bias=False, o_bias=False, qk_norm=False, rms_norm_eps=1e-6)
        config = model.Config(**fields)
        cache = model.KVCache(config, B, S)
        cache.update(0, k[:, :, :S - T], v[:, :, :S - T])
        cache.pos = S - T
        parts = [x[:, :, -T:].transpose(1, 2).flatten(2) for x in (q, k, v)]
        see = None
        if T > 1 and S > T:                     # as Decoder.positions_and_mask makes it
            see = torch.arange(S) <= torch.arange(S - T, S)[:, None]
        cos, sin = torch.ones(D), torch.zeros(D)
        out = identity_projections(config)(torch.cat(parts, dim=-1), cos, sin, see, cache)
        return out.view(B, T, H, D).transpose(1, 2)

    with torch.no_grad():
        agree(3, twin)


def test_the_cache():
    class Twin(model.KVCache):
        """Of the refusal, which the decoder speaks, and of advance, which it writes as pos = past + T."""
        def __init__(self, layers, B, K, max_len, D):
            fields = dict.fromkeys(model.Config.__dataclass_fields__)
            fields |= dict(num_hidden_layers=layers, num_key_value_heads=K, head_dim=D)
            super().__init__(model.Config(**fields), B, max_len)

        def update(self, layer, k, v):
            if self.pos + k.shape[2] > self.max_len:
                raise ValueError("does not fit")
            return super().update(layer, k, v)

        def advance(self, T):
            self.pos += T

    agree(4, Twin)


def test_the_safetensors_reader(tmp_path):
    def twin(data):
        (tmp_path / "file.safetensors").write_bytes(data)
        return load_weights.read_safetensors(tmp_path / "file.safetensors")

    agree(5, twin)


def test_join():
    def twin(piece, ranks):
        letters = [chr(byte) for byte in piece]
        back = lambda text: bytes(map(ord, text))
        return [back(part) for part in join(letters, lambda a, b: ranks.get((back(a), back(b))))]

    agree(6, twin)


def test_the_stream():
    class Bytes:                                # a tokenizer whose ids are the bytes themselves
        def bytes_of(self, piece, skip_special):
            return piece

    def twin(pieces):
        stream = Stream(Bytes(), False)
        for piece in pieces:
            yield stream.add(piece)
        yield stream.end()

    agree(7, twin)


def test_the_sampler_draws_from_these_probabilities():
    for name, (logits, temperature, top_k, top_p) in EXERCISES[8].cases().items():
        right = right_results(8, EXERCISES[8])[name]
        choose = sampler(temperature, top_k, top_p, seed=1)
        counts = torch.bincount(torch.tensor([choose(logits) for _ in range(2000)]), minlength=len(logits))
        assert not counts[right == 0].any(), name
        assert ((counts / 2000 - right).abs() < 4.5 * (right * (1 - right) / 2000).sqrt() + 1e-9).all(), name


def test_prompt_loss():
    def twin(logits, tokens, mask):
        losses = torch.zeros(len(tokens))
        for row, (z, x, real) in enumerate(zip(logits, tokens, mask)):
            if real.sum() > 1:
                losses[row] = slot.prompt_loss(z[real][:-1], x[real][1:])
        return losses

    agree(9, twin)


def test_optimize_delta():
    def twin(hidden, tokens, lm_head, steps, lr):
        return slot.optimize_delta(hidden, tokens, lm_head, steps, lr)

    agree(10, twin)


def test_the_gradient_is_that_of_autograd_of_finite_differences_and_of_the_study():
    def loss(hidden, targets, W, delta):
        return F.cross_entropy((hidden + delta) @ W.T, targets)

    def by_autograd(hidden, targets, W, delta):
        delta = delta.clone().requires_grad_()
        return torch.autograd.grad(loss(hidden, targets, W, delta), delta)[0]

    def by_differences(hidden, targets, W, delta):
        hidden, W, delta = hidden.double(), W.double(), delta.double()
        shifts = 1e-5 * torch.eye(len(delta), dtype=torch.float64)
        slopes = [(loss(hidden, targets, W, delta + s) - loss(hidden, targets, W, delta - s)) / 2e-5 for s in shifts]
        return torch.stack(slopes).float()

    agree(11, by_autograd)
    agree(11, by_differences)
    hidden, targets, W, delta = EXERCISES[11].cases()["δ = 0"]
    head = torch.nn.Linear(W.shape[1], len(W), bias=False)
    head.weight.data = W
    with torch.no_grad():
        study = Text(head, hidden, targets.tolist()).gradient() / len(targets)
    torch.testing.assert_close(study, right_results(11, EXERCISES[11])["δ = 0"], rtol=1e-5, atol=1e-6)


def test_the_closed_form():
    from speed.delta import optimize_delta_fast

    def twin(hidden, targets, W, steps, lr):
        head = torch.nn.Linear(W.shape[1], len(W), bias=False)
        head.weight.data = W
        head.requires_grad_(False)
        hidden = torch.cat((hidden, hidden[:1]))[None]          # the last position, which does not count
        tokens = [0, *targets.tolist()]
        delta, losses = optimize_delta_fast(hidden, tokens, head, steps, lr)
        return delta[0, 0], losses

    exercise = EXERCISES[12]
    results, right = run(exercise, twin)[0], right_results(12, exercise)
    for case in right:                          # how it makes its exponentials is its own affair
        assert not difference(results[case][:2], right[case][:2], 2e-4), case


def test_one_delta_each_is_each_alone():
    def twin(hidden, tokens, mask, lm_head, steps, lr):
        deltas, losses = torch.zeros(len(tokens), 1, hidden.shape[2]), torch.zeros(steps + 1, len(tokens))
        for row, (h, x, real) in enumerate(zip(hidden, tokens, mask)):
            if real.sum() > 1:
                delta, loss = slot.optimize_delta(h[None, real], x[real].tolist(), lm_head, steps, lr)
                deltas[row], losses[:, row] = delta[0], loss
        return deltas, losses

    agree(13, twin)


def test_the_change_and_the_hessian_are_those_of_autograd():
    def twin(z, W, delta, u):
        def gradient(delta):
            p = (z + W @ delta).softmax(-1)
            return W.T @ p.mean(0)

        change = (z + W @ delta).log_softmax(-1) - z.log_softmax(-1)
        return change, torch.func.jvp(gradient, (delta,), (u,))[1]

    agree(14, twin)
    for name, (_, _, _, u) in EXERCISES[14].cases().items():
        assert u @ right_results(14, EXERCISES[14])[name][1] >= 0


def test_score_and_sign_test():
    def twin(plain, steered, golds):
        pairs = [(strict(a, gold), strict(b, gold)) for a, b, gold in zip(plain, steered, golds)]
        fixed, broken = pairs.count((False, True)), pairs.count((True, False))
        return sum(a for a, _ in pairs), sum(b for _, b in pairs), fixed, broken, sign_test(fixed, broken)

    agree(15, twin)


def test_alignment_and_the_unigram_control():
    def twin(h_prompt, x_prompt, h_answer, x_answer, W, b):
        head = torch.nn.Linear(W.shape[1], len(W), bias=False)
        head.weight.data = W
        with torch.no_grad():
            gradients = [Text(head, h, x.tolist()).gradient()
                         for h, x in ((h_prompt, x_prompt), (h_answer, x_answer))]
        return F.cosine_similarity(*gradients, dim=0), unigram(x_prompt.tolist(), b)

    agree(16, twin)
