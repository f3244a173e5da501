"""The tokens that a text has behind other tokens, as in a whole prompt that ends with it.

Knows one tokenizer; nothing of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

#: So many tokens before the text are read again at most.
_NEAR = 32


class TextInPlace:
    """Encodes texts behind prompts.

    Args:
        tokenizer: a transformers tokenizer.
        table: its `token_bytes`.
    """

    def __init__(self, tokenizer: Any, table: list[bytes]) -> None:
        self.tokenizer = tokenizer
        self.table = table

    def __call__(self, before: Sequence[int], text: bytes) -> list[int]:
        """The ids of a text that follows some tokens.

        Tokenized together with what stands before it, since a tokenizer may write a space before
        a text that begins, or none. Where a token would reach across the border, alone: the prompt
        is what was read, and ends with its own last token.

        Args:
            before: ids of the prompt.
            text: UTF-8.
        """
        said = text.decode()
        alone: list[int] = []
        for context in (self._context(before), ""):
            for piece in (said, said.removeprefix(" ")):
                # The space may be one that the tokenizer writes by itself.
                ids = list(self.tokenizer(context + piece, add_special_tokens=False)["input_ids"])
                if (own := self._last(ids, text)) is not None:
                    return own
                alone = alone or ids if not context else alone
        return alone

    def _last(self, ids: list[int], text: bytes) -> list[int] | None:
        """Those at the end that stand for a text, or None where none do."""
        at, left = len(ids), len(text)
        while left > 0 and at:
            at -= 1
            left -= len(self.table[ids[at]])
        found = b"".join(self.table[i] for i in ids[at:])
        return ids[at:] if found == text else None

    def _context(self, before: Sequence[int]) -> str:
        """The end of the prompt as text, from its last special token on."""
        special = ""
        near: list[bytes] = []
        for index in self._backwards(before):
            if not self.table[index]:
                special = self.tokenizer.convert_ids_to_tokens(index) or ""
                break
            near.append(self.table[index])
        try:
            return special + b"".join(reversed(near)).decode()
        except UnicodeDecodeError:  # it begins or ends within a character
            return ""

    @staticmethod
    def _backwards(ids: Sequence[int]) -> Iterator[int]:
        return iter(list(ids[-_NEAR:])[::-1])
