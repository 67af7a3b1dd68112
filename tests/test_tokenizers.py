"""InternLM2's tokenizer: the fast one made from `tokenizer.model` is the slow one that the checkpoints point to.

The reference is `sentencepiece` itself plus what the released Python code does around it, written down here again.
"""

import itertools
import json
import random
import re
import shutil
import struct
import time
from io import BytesIO

import pytest
import torch
from conftest import GOLDEN
from transformers import AutoProcessor, AutoTokenizer

from sa2va.processing_sa2va import InternLM2Tokenizer

FOLDER = GOLDEN / "ivl_internlm2"
CORPUS = (
    "Please segment the dog  in this image.",
    "Sure, it is [SEG]. the cat and the dog, the big region",
    "héllo wörld naïve café 猫と犬 这是一个测试 图像 分割 😀 🐉 👨‍👩‍👧",
    "x = 1\n  y = 2\n\tz = 3 12345 67 890 a aa aaa aaaa aaaaa",
    "  leading and trailing  ",
) * 5
MODELS = {
    "released": None,
    "no space in front": {"add_dummy_prefix": False},
    "spaces collapse": {"remove_extra_whitespaces": True},
    "spaces collapse, none in front": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "characters normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False, "character_coverage": 0.98, "vocab_size": 200},
    "pieces taken whole": {"user_defined_symbols": ["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_12]", "<sep>"]},
}
BITS = [
    *"  \n\t\r\x00▁abcdehinortsS[]<>|_/.,!?'0123",
    *("é", "ö", "ß", "猫", "这", "图", "😀", "🐉", "👨‍👩‍👧", "ﬁ", "①", "½", "\uff21", "\u200b", "\u3000", "\ufffd"),
    *("the ", " the", "segment ", "aaa", "[SEG]", "<p>", "</p>", "<|im_end|>", "<s>", "</s>", "<unk>"),
    *("[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_12]", "<sep>"),
]


class Released:
    """What `tokenization_internlm2.py` does, on top of the `sentencepiece` library."""

    def __init__(self, model: bytes, added: dict[str, int]):
        from sentencepiece import SentencePieceProcessor

        self.pieces, self.added = SentencePieceProcessor(model_proto=model), added

    def encode(self, text: str) -> list[int]:
        """Ids of a text, which is cut at added tokens."""
        cuts = re.split("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")", text)
        ids = [[self.added[part]] if part in self.added else self.pieces.encode(part) for part in cuts if part]
        return [1, *(i for part in ids for i in part)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of ids; tokens outside the model are surrounded by spaces, those inside it are preceded by one."""
        names = {i: name for name, i in self.added.items()}
        tokens = [names.get(i, i) for i in ids if not (skip_special_tokens and i in names)]
        parts, words = [], []
        for token in tokens:
            if isinstance(token, str) and self.added[token] >= self.pieces.get_piece_size():
                parts += [self._join(words), token]
                words = []
            else:
                words.append(token)
        return " ".join(part for part in [*parts, self._join(words)] if part)

    def _join(self, tokens: list[int | str]) -> str:
        text, words, after_special = "", [], False
        for token in tokens:
            if isinstance(token, str):
                text += ("" if after_special else " ") + self.pieces.decode(words) + token
                words, after_special = [], True
            else:
                words.append(token)
                after_special = False
        text += self.pieces.decode(words)
        for mark in ".?!,":
            text = text.replace(f" {mark}", mark)
        for old in (" ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(old, old.strip())
        return text


def train(**options) -> bytes:
    """A small SentencePiece model of the kind InternLM2 uses, but for `options`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 480,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=file, **(defaults | options))
    return file.getvalue()


def write_folder(folder, model: bytes, added: dict[str, int]) -> None:
    """A tokenizer as released: `tokenizer.model` and a tokenizer_config.json that points to Python code."""
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    token = config["added_tokens_decoder"]["0"]
    config["added_tokens_decoder"] = {str(i): token | {"content": name} for name, i in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(model)
    shutil.copy(FOLDER / "config.json", folder)


def added_tokens(first: int) -> dict[str, int]:
    """The golden checkpoint's added tokens by name, of which those that are not SentencePiece's begin at `first`."""
    names = json.loads((FOLDER / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    names = {int(i): token["content"] for i, token in names.items()}
    return {name: i if i < 3 else i - 420 + first for i, name in names.items()}


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """(our tokenizer, the reference) of one SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    options = MODELS[request.param]
    model = (FOLDER / "tokenizer.model").read_bytes() if options is None else train(**options)
    added = added_tokens(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
    folder = tmp_path_factory.mktemp("tokenizer")
    write_folder(folder, model, added)
    return AutoTokenizer.from_pretrained(folder), Released(model, added)


@pytest.fixture(scope="module")
def tokenizer():
    """The golden checkpoint's."""
    return AutoTokenizer.from_pretrained(FOLDER)


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of words, spaces, scripts, emoji and added tokens in any order."""
    draw = random.Random(seed)
    return ["".join(draw.choices(BITS, k=draw.randint(0, 14))) for _ in range(count)]


def test_random_texts_have_the_ids_of_sentencepiece(pair):
    ours, released = pair
    for text in random_texts(1500):
        assert ours(text).input_ids == released.encode(text), repr(text)


@pytest.mark.parametrize("skip", [False, True])
def test_random_texts_are_decoded_as_released(pair, skip):
    ours, released = pair
    for text in random_texts(700, seed=1):
        ids = released.encode(text)
        assert ours.decode(ids, skip_special_tokens=skip) == released.decode(ids, skip), repr(text)


def test_random_ids_are_decoded_as_released(pair):
    """Which a model may write: half characters, stray bytes, added tokens side by side."""
    ours, released = pair
    never = {ours.convert_tokens_to_ids("<0x20>")}  # text has no such byte: spaces are always pieces
    ids = sorted(set(range(len(ours))) - never)
    draw = random.Random(2)
    for _ in range(700):
        answer = draw.choices(ids, k=draw.randint(0, 10))
        assert ours.decode(answer) == released.decode(answer, False), ours.convert_ids_to_tokens(answer)


def test_added_tokens_in_place_of_a_piece_keep_their_ids_and_spaces(tmp_path):
    """So has InternLM2 its chat marks: they rename spare pieces, and only tokens beyond the model get spaces around."""
    model = train(user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(140, 146)])
    names = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
    first = Released(model, {}).pieces.piece_to_id("[UNUSED_TOKEN_140]")
    size = Released(model, {}).pieces.get_piece_size()
    added = added_tokens(size - len(names)) | {name: first + i for i, name in enumerate(names)}
    write_folder(tmp_path, model, added)
    ours, released = AutoTokenizer.from_pretrained(tmp_path), Released(model, added)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nSure, it is [SEG].<|im_end|>"
    ids = released.encode(text)
    assert ours(text).input_ids == ids and added["<|im_end|>"] in ids
    assert ours.decode(ids) == released.decode(ids, False)
    assert ours.decode(ids).endswith(" [SEG] .<|im_end|>")


def test_saved_as_tokenizer_json_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    AutoProcessor.from_pretrained(FOLDER).save_pretrained(tmp_path / "processor")
    shutil.copy(FOLDER / "config.json", tmp_path / "tokenizer")
    shutil.copy(FOLDER / "config.json", tmp_path / "processor")
    assert not list(tmp_path.rglob("tokenizer.model"))
    again = (
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        AutoProcessor.from_pretrained(tmp_path / "processor").tokenizer,
    )
    for other in again:
        assert type(other) is InternLM2Tokenizer and len(other) == len(tokenizer)
        for text in random_texts(300, seed=3):
            ids = tokenizer(text).input_ids
            assert other(text).input_ids == ids and other.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("special_named_in", ["tokenizer_config.json", "special_tokens_map.json"])
def test_added_tokens_json_alone_is_enough(special_named_in, tokenizer, tmp_path):
    """Older checkpoints list no added_tokens_decoder."""
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    if special_named_in == "special_tokens_map.json":
        del config["additional_special_tokens"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    older = AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(300, seed=4):
        ids = tokenizer(text).input_ids
        assert older(text).input_ids == ids
        for skip in (False, True):
            assert older.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_added_tokens_are_found_in_the_text_as_it_is(tokenizer, tmp_path):
    """Fast tokenizers would look for one marked `normalized` only behind a space."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden*", "model*"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    seg = config["added_tokens_decoder"]["435"]
    assert seg["content"] == "[SEG]"
    seg["normalized"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path)("a[SEG]b").input_ids == tokenizer("a[SEG]b").input_ids


def test_numbers_beyond_the_last_token_are_left_out(tokenizer):
    """A model may have more rows than there are tokens."""
    ids = tokenizer("Hi").input_ids
    assert tokenizer.decode([*ids, len(tokenizer) + 3]) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["ivl_internlm2", "ivl_qwen2"])
def test_a_decoded_answer_behind_its_prompt_has_the_same_ids_again(family):
    """What `past_text` is made of."""
    processor = AutoProcessor.from_pretrained(GOLDEN / family)
    prompt = processor.build_prompt("Hi")
    prompt_ids = processor.tokenizer(prompt).input_ids
    for answer in random_texts(300, seed=5):
        ids = processor.tokenizer(prompt + answer).input_ids
        if ids[: len(prompt_ids)] != prompt_ids:
            continue  # the answer's first letters merge with the prompt's last: no model can write it
        text = processor.decode_continuation(torch.tensor([prompt_ids]), torch.tensor(ids[len(prompt_ids) :]))
        assert processor.tokenizer(prompt + text).input_ids == ids, repr(answer)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1477754\n",
        b"\xff" * 400_000,
        b"\x0a" + b"\xff" * 9 + b"\x01",  # a piece of 2^64 bytes
    ],
    ids=["a pointer", "a number without end", "a piece without end"],
)
def test_what_is_no_sentencepiece_model_is_refused(content, tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden*", "model*"))
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="no SentencePiece model"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options", [{"model_type": "unigram", "vocab_size": 340}, {"treat_whitespace_as_suffix": True}]
)
def test_another_kind_of_sentencepiece_model_is_refused(tmp_path, options):
    write_folder(tmp_path, train(**options), {})
    with pytest.raises(ValueError, match="no byte-pair encoding"):
        AutoTokenizer.from_pretrained(tmp_path)


def synthetic_model(size: int) -> bytes:
    """A SentencePiece file of `size` pieces: those that every one has, letters, and pairs of letters."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)

    def message(field: int, content: bytes) -> bytes:
        return number(field << 3 | 2) + number(len(content)) + content

    def piece(text: str, score: float, kind: int) -> bytes:
        return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + number(kind))

    letters = ["▁", *map(chr, range(0x4E00, 0x4E00 + 320))]
    words = [*letters, *map("".join, itertools.product(letters, letters))][: size - 259]
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *((f"<0x{byte:02X}>", 0, 6) for byte in range(256))]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    return b"".join(piece(*p) for p in pieces) + message(2, b"\x18\x02") + message(3, b"\x20\x00")


@pytest.mark.slow
def test_a_vocabulary_of_the_released_size_is_converted_in_seconds(tmp_path):
    write_folder(tmp_path, synthetic_model(92_544), added_tokens(92_544))
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert time.process_time() - start < 15
    assert len(tokenizer) == 92_544 + 20 and tokenizer("[SEG]").input_ids == [1, 92_544 + 15]
