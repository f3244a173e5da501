"""A student with two teachers of unlike tokenizers and sizes, and rows that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import equivalence, tiny

FIELD = "task"
#: By name: the folder. The first has a tokenizer of its own, the second the student's.
FOLDERS = {"math": "teacher", "chat": "second"}


def save(folder: Path) -> Path:
    """Student, teachers and rows; as `equivalence.save_pair`."""
    equivalence.save_pair(folder)
    tokenizer = tiny.byte_level_tokenizer()
    tiny.tiny_llama(len(tokenizer), 40, seed=2).save_pretrained(folder / "second")
    tokenizer.save_pretrained(folder / "second")
    named = rows(equivalence.ROWS)
    tiny.write_rows(folder / "rows.jsonl", named)
    tiny.write_rows(folder / "reversed.jsonl", named[::-1])
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations that ask the teachers by turns."""
    names = list(FOLDERS)
    return [row | {FIELD: names[i % len(names)]} for i, row in enumerate(tiny.chat_rows(count))]


def block(folder: Path, **keys: Any) -> dict[str, Any]:
    """A `dskd:` block with both teachers."""
    teachers = {name: {"base_model": str(folder / path)} for name, path in FOLDERS.items()}
    return {"teachers": teachers, "route": {"field": FIELD}, **keys}
