"""tokenizer/bpe.py: pieces, and pairs joined, against the reference library (make_golden_tokenizer.py) and by hand."""
import json
import random
import unicodedata

import pytest

import make_golden_tokenizer as golden
from small_tokenizer import LEVEL, P, changed, ends, spec, write
from tokenizer import bpe, load_tokenizer

ANSWERS = json.loads(golden.FILE.read_text())


def pieces(ours, text):
    return [ours.decode([id]) for id in ours.encode(text)]


@pytest.mark.parametrize("seed", golden.SEEDS)
def test_ids_are_the_reference_librarys(tmp_path, seed):
    data = golden.tokenizer_json(seed)
    ours = load_tokenizer(write(tmp_path, data))
    for text, (special, ordinary) in zip(golden.texts(seed), ANSWERS["ids"][str(seed)], strict=True):
        assert ours.encode(text, allow_special=True) == special
        assert ours.encode(text) == ordinary
        if len(data["model"]["vocab"]) >= 256 and seed % 5 != 4 and not ours.normalized.ids:
            assert ours.normalize(ours.decode(special)) == ours.normalize(text)


def to_letters(text):
    return "".join(golden.LETTER[byte] for byte in text.encode())


def by_id(piece, vocab):
    """As tiktoken joins: any two neighbours that make a token, the lowest id first, and a piece that is a token as it stands."""
    piece = to_letters(piece)
    if piece in vocab:
        return [vocab[piece]]
    return [vocab[part] for part in bpe.join(piece, lambda a, b: vocab.get(a + b))]


def test_seeds_reach_both_sides():
    """Some of the tokenizers must be ones where tiktoken's rule gives other ids, or the reference's answers prove little."""
    doubted = 0
    for seed in golden.SEEDS:
        model = golden.tokenizer_json(seed)["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        pairs = bpe.BytePairs(model["vocab"], merges, (bpe.GPT2,), model["ignore_merges"])
        pieces = {piece for text in golden.texts(seed) for piece in pairs.pieces(text) if set(to_letters(piece)) <= model["vocab"].keys()}
        doubted += any(pairs.ids_of(piece) != by_id(piece, model["vocab"]) for piece in pieces)
    assert 5 < doubted < len(golden.SEEDS) - 5


def test_where_pairs_are_those_of_tiktoken_so_are_the_ids():
    """A vocabulary that training yields: join by list, join by id (`by_id` above) and tiktoken agree on everything."""
    tiktoken = pytest.importorskip("tiktoken")
    model = json.loads((golden.FOLDERS / "gpt2" / "tokenizer.json").read_text())["model"]
    vocab = {token: id for token, id in model["vocab"].items() if token != "<|endoftext|>"}
    for byte in (0xC0, 0xC1, *range(0xF5, 256)):                    # tiktoken wants all bytes, also those that UTF-8 never has
        vocab[golden.LETTER[byte]] = 10_000 + byte
    pairs = bpe.BytePairs(vocab, model["merges"], (bpe.GPT2,))
    ranks = {bpe.from_letters(token): id for token, id in vocab.items()}
    theirs = tiktoken.Encoding("x", pat_str=bpe.GPT2, special_tokens={}, mergeable_ranks=ranks)
    r = random.Random(0)
    words = ["the", " a", "12", "é", "数", "\n", " ", "'s", ".", "in", "\x04"]
    for text in golden.TEXTS + ["".join(r.choice(words) for _ in range(40)) for _ in range(200)]:
        assert pairs.encode(text) == theirs.encode_ordinary(text)
        assert pairs.encode(text) == [id for piece in pairs.pieces(text) for id in by_id(piece, vocab)]


@pytest.mark.parametrize("name", golden.CUTS)
def test_published_settings_give_the_reference_librarys_ids(name):
    ours = load_tokenizer(golden.FOLDERS / name)
    answers = json.loads((golden.FOLDERS / name / "answers.json").read_text())["ids"]
    assert len(answers) >= 60
    for text, (special, ordinary) in zip(golden.TEXTS, answers, strict=True):
        assert ours.encode(text, allow_special=True) == special, text
        assert ours.encode(text) == ordinary, text


def test_a_byte_without_a_token_is_dropped_before_pairs_are_joined(tmp_path):
    data = spec(["h i", "! !"])
    del data["model"]["vocab"][golden.LETTER[4]], data["model"]["vocab"][golden.LETTER[0xE4]]
    ours = load_tokenizer(write(tmp_path, data))
    assert pieces(ours, "!\x04!") == ["!!"] and pieces(ours, "h\x04i") == ["h", "i"] and ours.encode("\x04\x04") == []
    assert ours.encode("中a") == [0xB8, 0xAD, ord("a")]             # of three bytes the first is lacking
    assert len(golden.LACKING["smollm2"]) == 8                      # the published vocabulary lacks these; see answers.json


def test_a_pair_outside_the_list_is_not_joined(tmp_path):
    """h+i, i+j, and hi+j are tokens: tiktoken would make "hij" of [hi, j], but the list makes it of [h, ij] only."""
    ours = load_tokenizer(write(tmp_path, spec(["h i", "i j", "h ij"])))
    assert pieces(ours, "hij") == ["hi", "j"]
    whole = load_tokenizer(write(tmp_path, spec(["h i", "i j", "h ij"], ignore_merges=True)))
    assert pieces(whole, "hij hij") == ["hij", " ", "hi", "j"]


def test_merge_lists_that_no_training_yields(tmp_path):
    lists = {
        # abc is made by two pairs, with c+d between them in the list: of [ab, c, d], c+d comes first
        ("a b", "a bc", "c d", "ab c", "b c"): ("abcd", ["ab", "cd"]),
        # abcde is a token, but its own bytes stop at [a, bc, de]: no text but its own spelling shows it
        ("b c", "d e", "a b", "c de", "ab cde"): ("abcde", ["a", "bc", "de"]),
        # a pair that is listed twice has its last place
        ("a b", "b c", "a b"): ("abc", ["a", "bc"]),
        # the leftmost of equal pairs, and the two pairs of "aaa" in their order
        ("a a", "a aa", "aa a"): ("aaaaa", ["aa", "aaa"]),
    }
    for number, (merges, (text, parts)) in enumerate(lists.items()):
        ours = load_tokenizer(write(tmp_path / str(number), spec(merges)))
        assert pieces(ours, text) == parts, merges
        assert pieces(ours, f"{text} {text}.{text}") == [*parts, " ", *parts, ".", *parts]


def test_how_text_is_cut_into_pieces(tmp_path):
    assert (bpe.QWEN2, bpe.LLAMA3) == (golden.QWEN, golden.LLAMA) and len(bpe.PUBLISHED) == 5
    bytes = {key: LEVEL[key] for key in LEVEL if key != "use_regex"}
    digits = {"type": "Digits", "individual_digits": True}
    for steps, parts in (([{**LEVEL, "use_regex": True}], ["x", "Ġ12"]), ([bytes], ["x", "Ġ12"]), ([digits, bytes], ["x", "Ġ", "1", "2"]),
                         ([golden.split(bpe.LLAMA3), LEVEL], ["x", "Ġ", "12"]), ([golden.split(bpe.QWEN2), LEVEL], ["x", "Ġ", "1", "2"])):
        data = spec(["x Ġ", "1 2", "Ġ 12"])
        changed(data, P, {"type": "Sequence", "pretokenizers": steps})
        assert pieces(load_tokenizer(write(tmp_path, data)), "x 12") == [part.replace("Ġ", " ") for part in parts], steps


@pytest.mark.parametrize("cuts", bpe.PUBLISHED, ids=bpe.PUBLISHED.values())
def test_no_character_is_lost_between_pieces(cuts):
    pairs, r = bpe.BytePairs({}, [], cuts), random.Random(1)
    for text in golden.TEXTS + ["".join(chr(r.choice([r.randrange(0x300), r.randrange(0xD800), r.randrange(0xE000, 0x110000)]))
                                        for _ in range(40)) for _ in range(300)]:
        assert "".join(pairs.pieces(text)) == text and "" not in pairs.pieces(text)


@pytest.mark.parametrize("cuts", bpe.PUBLISHED, ids=bpe.PUBLISHED.values())
def test_no_text_makes_an_expression_slow(cuts):
    pairs = bpe.BytePairs({}, [], cuts)
    for unit in ("a", " ", "\n", "1", "!", "\u0301", "' ", "'s", " \n", "a1", "a\u0301", "数", "\u00a0"):
        with ends(10):
            pairs.pieces(unit * 100_000 + "x")


def test_hundreds_of_thousands_of_spaces(tmp_path):
    ours = load_tokenizer(write(tmp_path, spec(["Ġ Ġ"])))
    assert ours.encode(" " * 600_000 + "a") == [256] * 299_999 + [32, 32, ord("a")]


def test_the_list_decides_not_the_id(tmp_path):
    data = spec(["a b", "b c"])
    data["model"]["vocab"] |= {"ab": 900, "bc": 300}
    assert load_tokenizer(write(tmp_path, data)).encode("abc") == [900, ord("c")]
    data["model"]["merges"].reverse()
    assert load_tokenizer(write(tmp_path, data)).encode("abc") == [ord("a"), 300]


def test_a_token_without_a_merge_is_taken_only_as_a_whole_piece(tmp_path):
    for whole, parts in ((False, ["x", "y", "z"]), (True, ["xyz"])):
        ours = load_tokenizer(write(tmp_path, spec(extra=["xyz"], ignore_merges=whole)))
        assert pieces(ours, "xyz") == parts and pieces(ours, "xyzx") == ["x", "y", "z", "x"]


def test_join_by_hand_and_on_a_long_piece():
    table = {("e", "r"): 0, ("w", "er"): 1, ("l", "o"): 2, ("a", "a"): 3, ("aa", "aa"): 4}
    rank = lambda a, b: table.get((a, b))
    assert bpe.join("lower", rank) == ["lo", "wer"]
    assert bpe.join("aaaaa", rank) == ["aaaa", "a"] and bpe.join("", rank) == []
    with ends():
        assert bpe.join("a" * 100_001, rank) == ["aaaa"] * 25_000 + ["a"]


def test_merges_as_texts_and_as_lists(tmp_path):
    data = spec(["h i", "Ġ hi", "l l", "' ll"])
    one = load_tokenizer(write(tmp_path / "1", data))
    data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    two = load_tokenizer(write(tmp_path / "2", data))
    text = "hi hi'll e\u0301 12 hi"
    assert one.encode(text) == two.encode(text) and one.decode(one.encode(text)) == unicodedata.normalize("NFC", text)


def test_letters_are_bytes():
    for byte in range(256):
        assert bpe.from_letters(golden.LETTER[byte]) == bytes([byte])
    assert bpe.from_letters("Ġhi") == b" hi" and bpe.from_letters(" é數") == " é數".encode()
