"""Every way to a product is x Wᵀ + b, rounded once or twice, whichever the stopwatch picks; Wᵀ r
likewise; and a model whose products were swapped is still the model."""
import functools

import pytest
import torch
import torch.nn as nn

pytest.importorskip("speed.linear", reason="there is no speed/")

from benchmarks.machine import working
from load_weights import load_model
from slot import generate, optimize_delta
from slot_cases import GOLDEN, golden_prompt, hidden_of, largest, load
from speed import linear
from test_model import HALF, difference, relative_rms
from test_model import load as load_golden

CLOSE = {torch.bfloat16: 0.004, torch.float16: 0.0005, torch.float32: 5e-6}
SHAPES = [(5, 64), (100, 64), (1024, 64), (2500, 64), (4096, 64), (20001, 64), (16, 4104)]
EVERY_WAY = [(dtype, way) for dtype in linear.WAYS for way in linear.ways_for(dtype, 1)]

ways = pytest.mark.parametrize("dtype, way", EVERY_WAY, ids=lambda x: getattr(x, "__name__", str(x)[6:]))
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("SLOT_PRODUCTS", raising=False)


def works(way, dtype):
    return bool(working([way], torch.zeros(1, 2, dtype=dtype), [torch.zeros(3, 2, dtype=dtype)]))


def skip_unless_works(way, dtype):
    if not works(way, dtype):
        pytest.skip(f"this processor or this torch has no {way.__name__} of {dtype}")


def swap(layer, way):
    """What `use` does to a layer: one row by `way`, more as well, and a gradient, where it can."""
    skip_unless_works(way, layer.weight.dtype)
    more = linear.plain if way is linear.vector else way
    trained = way if way in linear.ways_for(layer.weight.dtype, linear.TRAINED) else linear.plain
    table = {linear.TRAINED: trained, 1: way, 1 << 62: more}
    layer.forward = functools.partial(linear.product, layer, table)
    return layer


def random_layer(outputs, inputs, dtype):
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs).requires_grad_(False).to(dtype)
    layer.weight.data = torch.randn(outputs, inputs, generator=draw).to(dtype)
    layer.bias.data = torch.randn(outputs, generator=draw).to(dtype)
    return layer, draw


@ways
@pytest.mark.parametrize("outputs, inputs", SHAPES)
@torch.no_grad()
def test_products(dtype, way, outputs, inputs):
    """One row, few, many, in every shape that a decoder hands over; with a bias and without."""
    layer, draw = random_layer(outputs, inputs, dtype)
    given = swap(layer, way).bias
    for rows in ((1,), (1, 1), (3, 1), (2, 20), (70,), (1, 0)):
        x = torch.randn(*rows, inputs, generator=draw).to(dtype)
        product = x.double() @ layer.weight.double().T
        for bias in (given, None):
            layer.bias = bias
            y, exact = layer(x), product if bias is None else product + bias.double()
            assert y.shape == (*rows, outputs) and y.dtype == dtype
            off = relative_rms(y, exact) if len(y.flatten()) else 0
            assert off < CLOSE[dtype], f"{rows}, bias {bias is not None}: relative rms error {off:.1e}"


@dtypes
@torch.no_grad()
def test_packed_weights(dtype):
    """The same values from the packed copy, which is what is multiplied; a W that has changed since, in place or by another
    tensor in its place, is multiplied as it is now; what cannot be packed is not."""
    layer, draw = random_layer(100, 64, dtype)
    W, x = swap(layer, linear.onednn).weight, torch.randn(3, 64, generator=draw).to(dtype)
    before = layer(x)
    linear.pack(W)
    assert relative_rms(layer(x), before) < CLOSE[dtype]
    other = torch.zeros_like(W)
    linear.pack(other)
    W.packed = *W.packed[:2], other.packed[2]
    assert (layer(x) == layer.bias).all(), "the copy is not what is multiplied"
    W.mul_(2)
    assert relative_rms(layer(x) - layer.bias, 2 * (before - layer.bias)) < 2 * CLOSE[dtype]
    for _ in range(6):                      # where the last one stood, a new one may come to stand
        linear.pack(W)
        W.data = torch.randn(W.shape, generator=draw).to(dtype)
        assert relative_rms(layer(x) - layer.bias, x.double() @ W.double().T) < 2 * CLOSE[dtype]
    whole = torch.ones(2, 2, dtype=torch.int64)
    linear.pack(whole)
    assert not hasattr(whole, "packed")


def test_a_slice_is_multiplied_without_a_copy_of_the_weight():
    """hidden[:, :-1] is a case in which torch would copy the whole weight, once for each sample."""
    layer = nn.Linear(64, 1 << 16, bias=False).requires_grad_(False)
    x = torch.zeros(2, 30, 64)
    for way in linear.WAYS[torch.float32]:
        swap(layer, way)
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            layer(x[:, :-1])
            layer(x[:1, :-1])
            layer(x[:, -1:])
        made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
        assert made < 2.5 * 4 * (3 * 29 + 2) * (1 << 16), f"{way.__name__}: {made} bytes on the way"


# ---- gradients -------------------------------------------------------------------------------------------


@ways
def test_gradients_are_autograds(dtype, way):
    """Of x alone where the weight is frozen, which is what the loop of slot.py asks for; of all where
    it is not."""
    layer, draw = random_layer(100, 64, dtype)
    swap(layer, way)
    for rows in (1, 3):
        r = torch.randn(rows, 100, generator=draw).to(dtype)
        for frozen in (True, False):
            layer.requires_grad_(not frozen)
            x = torch.randn(rows, 64, generator=draw).to(dtype).requires_grad_()
            layer(x).backward(r)
            assert relative_rms(x.grad, r.double() @ layer.weight.double()) < CLOSE[dtype]
            assert (layer.weight.grad is None) == (layer.bias.grad is None) == frozen
            if not frozen:
                assert relative_rms(layer.weight.grad, r.double().T @ x.double()) < CLOSE[dtype]
                assert relative_rms(layer.bias.grad, r.double().sum(0)) < CLOSE[dtype]
                layer.weight.grad = layer.bias.grad = None


@ways
def test_a_bias_alone_can_be_trained(dtype, way):
    """As in BitFit: the weight is frozen, its bias is not."""
    for rows in (1, 3):
        layer = swap(nn.Linear(4, 5).to(dtype), way)
        layer.weight.requires_grad_(False).zero_()
        layer(torch.ones(rows, 4, dtype=dtype)).sum().backward()
        assert layer.bias.grad.tolist() == [rows] * 5


# ---- a model ---------------------------------------------------------------------------------------------


def weights_of(lm):
    return [module.weight for module in lm.modules() if isinstance(module, nn.Linear)]


def used(name, dtype, way, monkeypatch):
    """A golden model with its products forced -> the model, what it says of them, and the golden values.
    Where `way` cannot be, torch's own stands."""
    monkeypatch.setattr(linear, "SMALL", 1)
    monkeypatch.setattr(linear, "fastest", lambda ways, x, matrices: next((each for each in ways if each.__name__ == way), ways[0]))
    lm = load_model(GOLDEN / name, dtype=dtype)
    return lm, linear.use(lm), load_golden(name)[1]


@pytest.mark.parametrize("way", ["plain", "onednn", "vector"])
@pytest.mark.parametrize("name", [
    "llama2_published", "llama_biases", "qwen2", "qwen2_tied", "qwen3_tied_yarn"])
@torch.no_grad()
def test_models_in_float32(name, way, monkeypatch):
    """The golden logits and greedy tokens, whichever way; as the reference library computed them."""
    skip_unless_works(getattr(linear, way), torch.float32)
    lm, said, golden = used(name, "float32", way, monkeypatch)
    assert said == ", ".join(sorted({way, "plain"}))
    off = difference(lm(golden["prompt"]), golden["logits"])
    assert off < 2e-4, f"{name}: logits differ by {off:.2e}"
    for tokens, new in zip(golden["prompt"].tolist(), golden["greedy"].tolist()):
        assert list(generate(lm, tokens, len(new))) == new


@pytest.mark.parametrize("way", ["plain", "onednn", "vector", "float32"])
@pytest.mark.parametrize("name", HALF)
@torch.no_grad()
def test_models_in_16_bits(name, way, monkeypatch):
    skip_unless_works(getattr(linear, way), HALF[name])
    lm, said, golden = used(name, "auto", way, monkeypatch)
    assert said == ", ".join(sorted({way, "plain"}))
    assert {hasattr(W, "packed") for W in weights_of(lm)} == {way == "onednn"}
    allowed = {torch.bfloat16: 0.03, torch.float16: 0.005}[HALF[name]]
    for rows in (1, 2):
        logits = lm(golden["prompt"][:rows])
        assert logits.dtype == HALF[name]
        off = relative_rms(logits, golden["logits"][:rows])
        assert off < allowed, f"{name}, {rows} rows: relative rms error {off:.2e}"


@pytest.mark.parametrize("way, sooner, free, packed", [
    ("onednn", True, 2.1, True), ("onednn", True, 1.9, False), ("onednn", False, 2.1, False), ("vector", True, 2.1, False)])
def test_weights_are_packed_where_that_pays_and_there_is_room(way, sooner, free, packed, monkeypatch):
    """What is timed is packed if there is room and one row gains by it; what is kept, if the stopwatch prefers it."""
    skip_unless_works(linear.onednn, torch.float32)
    lm = load_model(GOLDEN / "qwen2", dtype="float32")
    size, timed = sum(parameter.nbytes for parameter in lm.parameters()), set()
    monkeypatch.setattr(linear, "SMALL", 1)
    monkeypatch.setattr(linear, "free_memory", lambda device: free * size)

    def fastest(ways, x, matrices):
        if linear.plain not in ways:                        # asked by `pays`
            return ways[sooner]
        timed.update(hasattr(W, "packed") for W in matrices if linear.onednn in ways)
        return getattr(linear, way) if getattr(linear, way) in ways else linear.plain

    monkeypatch.setattr(linear, "fastest", fastest)
    linear.use(lm)
    assert timed == {free > 2 and sooner}
    assert {hasattr(W, "packed") for W in weights_of(lm)} == {packed}
    monkeypatch.setattr(linear, "free_memory", lambda device: 0)
    linear.use(lm)
    assert {hasattr(W, "packed") for W in weights_of(lm)} == {False}, "the copies of before stay"


def test_one_row_is_timed_with_its_packed_copy_and_without(monkeypatch):
    """Which is which shows in copies that are zero. What cannot be packed does not pay."""
    skip_unless_works(linear.onednn, torch.float32)
    W, zeros, found = torch.ones(3, 2), torch.zeros(3, 2), []
    linear.pack(zeros)

    def pack(W):
        W.packed = W.detach(), W._version, zeros.packed[2]

    def fastest(ways, x, matrices):
        found.append([way(x / x, matrices[0], None).tolist() for way in ways])
        return ways[1]

    monkeypatch.setattr(linear, "pack", pack)
    monkeypatch.setattr(linear, "fastest", fastest)
    assert linear.pays([W]) and found == [[[[2, 2, 2]], [[0, 0, 0]]]]
    monkeypatch.setattr(linear, "pack", lambda W: None)
    assert not linear.pays([torch.ones(3, 2)])


@pytest.mark.parametrize("way", ["onednn", "vector"])
def test_the_loop_of_slot_on_swapped_products(way, monkeypatch):
    """Autograd goes through them: the same δ as without."""
    skip_unless_works(getattr(linear, way), torch.float32)
    lm, _, _ = used("qwen2", "float32", way, monkeypatch)
    tokens = golden_prompt("qwen2")[0].tolist()
    fits = []
    for each in (lm, load(GOLDEN / "qwen2")):
        hidden = hidden_of(each, tokens)
        fits.append(optimize_delta(hidden, tokens, each.lm_head, 5, 0.1)[0])
    assert largest(fits[0] - fits[1]) < 2e-5


def test_a_forward_of_the_readers_own_stays(monkeypatch):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    monkeypatch.setattr(linear, "SMALL", 1)
    lm = load_model(GOLDEN / "qwen2", dtype="float32")
    h, before = torch.randn(1, lm.config.hidden_size), lm.lm_head.weight
    lm.lm_head.__class__ = Half
    linear.use(lm)
    assert relative_rms(lm.lm_head(h), h @ before.T / 2) < 1e-5


def test_a_small_model_keeps_its_own(monkeypatch):
    """Nothing is timed, and nothing swapped, where any way will do, and where it is said that torch's own is wanted."""
    monkeypatch.setattr(linear, "fastest", None)
    lm = load_model(GOLDEN / "qwen2", dtype="float32")
    assert linear.use(lm) == "plain"
    monkeypatch.setattr(linear, "SMALL", 1)
    monkeypatch.setenv("SLOT_PRODUCTS", "plain")
    assert linear.use(lm) == "plain"
    assert not any("forward" in vars(module) for module in lm.modules())


@dtypes
def test_the_stopwatch_decides(dtype, monkeypatch):
    """Every class of rows, of the layers and of the head, gets the way that took least time; the values
    stay."""
    monkeypatch.setattr(linear, "SMALL", 1)
    lm = load_model(GOLDEN / "qwen2", dtype=dtype)
    tokens = golden_prompt("qwen2")
    with torch.no_grad():
        before = lm(tokens)
    asked = []

    def fastest(ways, x, matrices):
        shape, = {W.shape for W in matrices}
        ways = [way for way in ways if works(way, dtype)]
        asked.append((len(x), shape, ways[len(asked) % 5 % len(ways)]))
        return asked[-1][-1]

    monkeypatch.setattr(linear, "pays", lambda matrices: False)
    monkeypatch.setattr(linear, "fastest", fastest)
    said = linear.use(lm)
    matrix, head = lm.model.layers[0].mlp.gate_proj, lm.lm_head
    piece = head.weight[:len(head.weight) // 16 + 1]
    assert [(rows, shape) for rows, shape, _ in asked] == [
        (max(1, rows), W.shape if rows else W.T.shape)
        for W in (matrix.weight, piece) for rows in linear.CLASSES.values()]
    assert said == ", ".join(sorted({way.__name__ for *_, way in asked}))
    of_layers, of_head = asked[:len(asked) // 2], asked[len(asked) // 2:]
    assert [way for *_, way in of_layers] != [way for *_, way in of_head]
    o_proj = lm.model.layers[-1].self_attn.o_proj
    for module, choices in ((matrix, of_layers), (o_proj, of_layers), (head, of_head)):
        table = module.forward.args[1]
        assert [way.__name__ for way in table.values()] == [way.__name__ for *_, way in choices]
        assert table[linear.TRAINED] in (linear.plain, linear.vector)
    with torch.no_grad():
        assert relative_rms(lm(tokens), before) < 10 * CLOSE[dtype]


@pytest.mark.parametrize("rows, way", [
    (linear.TRAINED, "trained"), (1, "one"), (2, "two"), (3, "few"), (4, "few"), (5, "eight"), (8, "eight"), (9, "some"), (32, "some"), (33, "more"), (9999, "more")])
def test_classes_of_rows(rows, way):
    assert linear.way_of(dict(zip(linear.CLASSES, ["trained", "one", "two", "few", "eight", "some", "more"])), rows) == way


def test_fastest(monkeypatch):
    """The least time wins, but only by the margin; what this torch does not have never does; the first
    time, which warms up, decides nothing."""
    now = [0.0]
    monkeypatch.setattr(linear.time, "perf_counter", lambda: now[0])

    def way(name, *times):
        times = list(times)

        def call(x, W, b):
            if not times:
                raise RuntimeError("no such operation")
            now[0] += times[0]
            times.append(times.pop(0))
        call.__name__ = name
        return call

    def fastest(*ways):
        return linear.fastest(ways, None, [None]).__name__

    own, nearly, warms_up = way("own", 10), way("nearly", 9.5), way("warms up", 20, 30, 5, 30)
    slow, missing = way("slow", 50), way("missing")
    assert fastest(own, nearly, missing, slow) == "own"
    assert fastest(own, warms_up, missing) == "warms up"
    assert fastest(own, missing) == fastest(missing, own) == "own"
    assert fastest(way("cold", 99, 9, 9, 9), own) == "cold"

    looks = []
    hopeless = lambda x, W, b: looks.append(slow(x, W, b))
    assert linear.fastest([own, hopeless], None, [None]) is own and len(looks) == 2, "two looks are enough"


def test_every_call_is_with_another_matrix():
    """What one call has just read the cache would hand to the next."""
    seen = []
    linear.fastest([lambda x, W, b: seen.append(W)] * 2, None, list(range(linear.COLD)))
    assert len(seen) > 6 and seen[:9] == [*range(linear.COLD), 0, 1]


def test_use_times_what_it_has(monkeypatch):
    """For real, once: no clock is replaced."""
    monkeypatch.setattr(linear, "SMALL", 1)
    for name, dtype in (("qwen2", "float32"), ("llama_bf16", "auto")):
        lm = load_model(GOLDEN / name, dtype=dtype)
        known = {way.__name__ for way in linear.ways_for(lm.lm_head.weight.dtype, 1)}
        assert set(linear.use(lm).split(", ")) <= known
