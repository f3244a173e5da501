"""Token id -> the exact bytes it stands for, for tokenizers that can be undone.

Token *strings* cannot be compared across tokenizers: "Ġ", "▁" and "<0x0A>" are spellings of bytes,
and one multibyte character may be split over several tokens. Bytes can. This module knows one
tokenizer at a time and no text.
"""

from __future__ import annotations

import json
import re
from typing import Any

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level BPE alphabet (GPT-2).

    Printable Latin-1 characters stand for themselves, the other bytes, in order, for the code
    points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _components(node: Any) -> set[str]:
    """Names of all (nested) components of a serialized pre-tokenizer or decoder."""
    if isinstance(node, dict):
        inner = set().union(*(_components(value) for value in node.values()))
        return inner | ({node["type"]} if isinstance(node.get("type"), str) else set())
    if isinstance(node, list):
        return set().union(*(_components(value) for value in node))
    return set()


def normalisations(tokenizer: Any) -> list[str]:
    """Names of what a tokenizer does to a text before it splits it, beyond writing spaces as `▁`.

    A Unicode form (NFC, NFKC), lower case, stripped white space, sentencepiece's own table
    (Precompiled): texts that these change are spelled differently by another tokenizer.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return sorted(_components(spec["normalizer"]) - {"Sequence", "Prepend", "Replace"})


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Bytes of every token id, in order; special tokens and unused ids stand for no text: b"".

    Supported are byte-level BPE (GPT-2, Llama 3, Qwen, …), sentencepiece with `▁` and byte
    fallback (Llama 2, Mistral, Gemma, …), and added tokens of both, which stand for themselves
    unless a sentencepiece model has them, too.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.

    Raises:
        ValueError: another kind, whose tokens do not determine the text.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) has no fast backend, so the "
            "bytes of its tokens cannot be read. Use its fast version (tokenizer_use_fast: true, "
            "and no tokenizer_use_mistral_common)."
        )
    spec = json.loads(backend.to_str())
    decoder, pre_tokenizer = _components(spec["decoder"]), _components(spec["pre_tokenizer"])
    byte_level = "ByteLevel" in decoder | pre_tokenizer
    sentencepiece = "Metaspace" in decoder | pre_tokenizer or "ByteFallback" in decoder
    if spec["model"]["type"] in ("WordPiece", "WordLevel") or not (byte_level or sentencepiece):
        raise ValueError(
            f"the tokenizer of {name} ({spec['model']['type']}) is neither byte-level nor "
            "sentencepiece, so its tokens do not determine the text. It can't be used here."
        )
    added = {t["id"]: t for t in spec["added_tokens"]}
    special = {i for i, t in added.items() if t["special"]} | set(tokenizer.all_special_ids)
    alphabet = _byte_level_alphabet() if byte_level else {}
    vocabulary = tokenizer.get_vocab()
    # Gemma lists runs of spaces among its added tokens, but its model writes them, as ▁▁.
    of_model = backend.get_vocab(with_added_tokens=False) if sentencepiece else {}
    literal = {i for i in added if byte_level or of_model.get(added[i]["content"]) != i}
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if index in literal:
            table[index] = token.encode()
        elif byte_level:
            # A character outside the alphabet occurs in tokens that were added as plain text.
            table[index] = (
                bytes(alphabet[c] for c in token)
                if all(c in alphabet for c in token)
                else token.encode()
            )
        elif match := _HEX.fullmatch(token):
            table[index] = bytes([int(match[1], 16)])
        else:
            table[index] = token.replace("▁", " ").encode()
    return table


def shared_tokens(
    student: Any, teacher: Any, turn_ends: tuple[int, int] | None = None
) -> tuple[list[int], list[int]]:
    """Ids of the tokens that stand for the same bytes in both vocabularies, student's first.

    The end tokens (`ends`), which stand for no bytes, are pairs too. Where several ids of a
    vocabulary spell the same bytes (a byte token and a letter), the last is taken: byte tokens come
    first.

    Args:
        turn_ends: the tokens with which turns end; None: the ends of sequence.

    Raises:
        ValueError: one of the tokenizers can't be undone, see `token_bytes`.
    """
    by_bytes = {spelled: i for i, spelled in enumerate(token_bytes(teacher)) if spelled}
    ours = {spelled: i for i, spelled in enumerate(token_bytes(student)) if spelled}
    pairs = [(i, by_bytes[spelled]) for spelled, i in ours.items() if spelled in by_bytes]
    pairs += ends(student, teacher, turn_ends)
    return [a for a, _ in pairs], [b for _, b in pairs]


def ends(
    student: Any, teacher: Any, turn_ends: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """The end tokens that are each other's: with which turns end, and the ends of sequence where
    none of these is one of those."""
    eos = student.eos_token_id, teacher.eos_token_id
    if turn_ends is None:
        return [] if None in eos else [eos]
    if None in eos or eos[0] == turn_ends[0] or eos[1] == turn_ends[1]:
        return [turn_ends]
    return [turn_ends, eos]


def translation(
    source: Any,
    target: Any,
    untranslatable: int = -100,
    turn_ends: tuple[int, int] | None = None,
) -> list[int]:
    """For each id of the source's tokenizer the id of the same bytes in the target's.

    The end tokens (`ends`) translate to each other. Ids without an equal (other special tokens,
    ids that stand for no token) get `untranslatable`: never unk, never an end token.

    Args:
        turn_ends: the tokens with which turns end, source's first; None: the ends of sequence.

    Raises:
        ValueError: one of the tokenizers can't be undone, see `token_bytes`.
    """
    ids = {spelled: i for i, spelled in enumerate(token_bytes(target)) if spelled}
    table = [ids.get(spelled, untranslatable) for spelled in token_bytes(source)]
    for ours, theirs in ends(source, target, turn_ends):
        table[ours] = theirs
    return table


def first_tokens(tokenizer: Any, spelled: list[bytes], untranslatable: int = -100) -> list[int]:
    """For some bytes each the id of the token that the tokenizer would begin to write them with.

    The tokenizer's model alone splits them, without normalizer and pre-tokenizer: these are pieces
    of a text, not one. Bytes that it has no token for get `untranslatable`, and so does no byte.

    Args:
        tokenizer: one of those that `token_bytes` supports.
    """
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    byte_level = "ByteLevel" in _components(spec["decoder"]) | _components(spec["pre_tokenizer"])
    letters = {byte: letter for letter, byte in _byte_level_alphabet().items()}
    own = token_bytes(tokenizer)
    ids = []
    for piece in spelled:
        if byte_level:
            text = "".join(letters[byte] for byte in piece)
        else:
            text = _decodable(piece).replace(" ", "▁") or "".join(f"<0x{b:02X}>" for b in piece[:1])
        if text.startswith("<0x") and not byte_level:
            index = backend.token_to_id(text)
        else:
            index = next((token.id for token in backend.model.tokenize(text)), None)
        # An unknown token stands for no bytes.
        known = index is not None and index < len(own) and own[index]
        ids.append(index if known and piece.startswith(own[index]) else untranslatable)
    return ids


def _decodable(piece: bytes) -> str:
    """The text up to the first byte that is not whole UTF-8."""
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        return piece[: error.start].decode()
