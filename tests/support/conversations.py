"""Conversations as prepared rows of two sides, in each tokenizer's own template."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from axolotl_dskd.data.answers import AnsweredRows
from axolotl_dskd.data.outcomes import TOO_LONG
from axolotl_dskd.data.reconcile import STATUS, Reconcile
from axolotl_dskd.data.shared_text import writes_dummy_space
from tests.support import tiny
from tests.support.tokenizers import TOKENIZERS, byte_table

TEMPLATES = {"tiny byte-level": tiny.STUDENT_TEMPLATE, "tiny sentencepiece": tiny.TEACHER_TEMPLATE}
#: Of the real ones, in the manner of Llama 2: without a special token before the answer.
_PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def side(name: str, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation as one text in the tokenizer's template: the answers and
    their end tokens are supervised."""
    tokenizer = TOKENIZERS[name]()
    template = TEMPLATES.get(name, _PLAIN)
    eos = tokenizer.eos_token or "<｜end▁of▁sentence｜>"
    ids: list[int] = []
    labels: list[int] = []

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        from jinja2 import Template

        return Template(template).render(
            messages=messages,
            add_generation_prompt=prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=eos,
        )

    messages: list[dict[str, str]] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        before = render(messages, True)
        messages.append({"role": "assistant", "content": answer})
        after = render(messages, False)
        spans = tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        ids = spans["input_ids"]
        here = [
            token if start >= len(before) and end <= len(after.rstrip("\n")) else -100
            for token, (start, end) in zip(ids, spans["offset_mapping"], strict=True)
        ]
        labels = labels + here[len(labels) :]
    return ids, labels


def row(pair: tuple[str, str], turns: list[tuple[str, str]]) -> dict[str, Any]:
    ours, theirs = (side(name, turns) for name in pair)
    return {
        "input_ids": ours[0],
        "labels": ours[1],
        "teacher_input_ids": theirs[0],
        "teacher_labels": theirs[1],
    }


def reconcile(pair: tuple[str, str], limit: int = 4096) -> Reconcile:
    tables = [byte_table(name) for name in pair]
    dummies = [
        writes_dummy_space(TOKENIZERS[name](), table)
        for name, table in zip(pair, tables, strict=True)
    ]
    return Reconcile(*tables, limit, False, *dummies)


def prepared(pair: tuple[str, str], turns: list[tuple[str, str]]) -> dict[str, Any]:
    made = row(pair, turns)
    made |= reconcile(pair)(made)
    assert made.pop(STATUS) not in (TOO_LONG,)
    return made


@lru_cache
def answered(pair: tuple[str, str], limit: int = 4096) -> AnsweredRows:
    tokenizers = [TOKENIZERS[name]() for name in pair]
    rows = [prepared(pair, [("Say hello.", "Hello there.")])]
    return AnsweredRows(reconcile(pair, limit), *tokenizers, rows)
