"""Prompts out of prepared rows, and rows of answers: the same as if the answers had been data."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from axolotl_dskd.data.answers import LOGPROBS, NOTHING_WRITTEN, AnsweredRows
from axolotl_dskd.data.outcomes import TOO_LONG
from axolotl_dskd.data.reconcile import SPANS, STATUS, TEACHER_SPANS, Reconcile
from axolotl_dskd.data.shared_text import writes_dummy_space
from tests.support import tiny
from tests.support.tokenizers import TOKENIZERS, byte_table

PAIRS = [
    ("tiny byte-level", "tiny sentencepiece"),
    ("tiny sentencepiece", "tiny byte-level"),
    ("tiny byte-level", "tiny byte-level"),
    ("Mistral v1", "DeepSeek"),
    ("DeepSeek", "Mistral v3"),
]
TEXTS = [
    "Two plus three is five.",
    "Hola, ¿qué tal?",
    "def add(a, b):\n\treturn a + b",
    "你好,世界。 😀👩‍👩‍👧",
    "x",
    "Wood, ice and  a small paper boat.\n\n",
]
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


def own_answer(prompt: Any, made: dict[str, Any], who: str) -> list[int]:
    """Up to its last supervised token."""
    columns = ("input_ids", "labels")
    ids, labels = (made[c if who == "student" else f"teacher_{c}"] for c in columns)
    last = max(k for k, label in enumerate(labels) if label != -100)
    return ids[len(prompt[who].ids) : last + 1]


pairs = pytest.mark.parametrize("pair", PAIRS, ids=" ".join)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("text", TEXTS)
@pairs
def test_the_answer_of_a_row_written_again_is_that_row(pair, text: str, who: str):
    """Whoever writes it: what the other side reads is what it would have read in the data."""
    made = prepared(pair, [("Add two and three.", "No."), ("Tell me more.", text)])
    rows = answered(pair)
    prompt = rows.prompt(made)
    assert prompt is not None
    ids = own_answer(prompt, made, who)
    ended = ids[-1] in rows.end_ids[who]
    found = rows.row(prompt, ids, ended=ended, by=who)
    assert not isinstance(found, str), found
    start = len(prompt["student"].ids)
    size = len(found["input_ids"])
    assert found["input_ids"] == made["input_ids"][:size]
    assert [*found["labels"][start:], *[-100] * (len(made["labels"]) - size)] == made["labels"][
        start:
    ]
    assert found["teacher_input_ids"] == made["teacher_input_ids"]
    assert set(found["labels"][:start]) == {-100}
    assert len(found[SPANS]) == 8 * sum(y != -100 for y in found["labels"][1:])
    assert len(found[TEACHER_SPANS]) == 8 * sum(y != -100 for y in found["teacher_labels"][1:])


@pairs
def test_another_answer_is_the_row_that_the_data_would_have_had(pair):
    question = [("Say hello.", "Hello there.")]
    asked, wanted = prepared(pair, question), prepared(pair, [("Say hello.", TEXTS[1])])
    rows = answered(pair)
    ids = own_answer(rows.prompt(wanted), wanted, "student")
    found = rows.row(rows.prompt(asked), ids, ended=True)
    size = len(found["input_ids"])
    for key, values in wanted.items():
        assert found[key] == (values[:size] if key in ("input_ids", "labels") else values), key


@pairs
def test_a_cut_answer_supervises_what_was_written_and_no_end_of_turn(pair):
    made = prepared(pair, [("Add.", TEXTS[0])])
    rows = answered(pair)
    prompt = rows.prompt(made)
    ids = own_answer(prompt, made, "student")[:3]
    found = rows.row(prompt, ids, ended=False)
    said = [y for y in found["labels"] if y != -100]
    assert said == ids[: len(said)]
    assert said
    assert not {*found["teacher_labels"]} & {*rows.end_ids["teacher"]}


@pairs
def test_a_character_that_was_cut_ends_supervision(pair):
    made = prepared(pair, [("Smile!", "Sure: 😀")])
    rows = answered(pair)
    prompt, table = rows.prompt(made), byte_table(pair[0])
    ids = own_answer(prompt, made, "student")[:-1]
    while len(b"".join(table[i] for i in ids)) >= len("Sure: 😀".encode()):
        ids.pop()
    if b"".join(table[i] for i in ids).decode(errors="ignore") == "":
        pytest.skip("one token for all of it")
    found = rows.row(prompt, ids, ended=False)
    spoken = b"".join(table[y] for y in found["labels"] if y != -100)
    assert spoken.decode()


def test_what_stands_for_no_text_ends_the_answer_where_it_is_no_end():
    pair = PAIRS[0]
    rows, made = answered(pair), prepared(PAIRS[0], [("Add.", TEXTS[0])])
    prompt = rows.prompt(made)
    ids = own_answer(prompt, made, "student")
    special = TOKENIZERS[pair[0]]().convert_tokens_to_ids("<|user|>")
    found = rows.row(prompt, [*ids[:3], special, *ids[3:]], ended=True)
    plain = rows.row(prompt, ids[:3], ended=False)
    assert found == plain


@pytest.mark.parametrize("ids", [[], [1], [0, 1]], ids=["nothing", "an end", "a pad"])
def test_an_answer_without_text_is_none(ids: list[int]):
    rows = answered(PAIRS[0])
    prompt = rows.prompt(prepared(PAIRS[0], [("Add.", TEXTS[0])]))
    assert rows.row(prompt, ids, ended=bool(ids)) == NOTHING_WRITTEN


def test_a_teacher_side_beyond_its_limit_is_refused():
    pair = PAIRS[0]
    made = prepared(pair, [("Add.", TEXTS[0])])
    rows = answered(pair, limit=len(made["teacher_input_ids"]))
    prompt = rows.prompt(made)
    ids = own_answer(prompt, made, "student")
    assert not isinstance(rows.row(prompt, ids, ended=True), str)
    assert rows.row(prompt, ids[:-1] * 2, ended=False) == TOO_LONG


def test_logprobs_stand_at_their_tokens():
    pair = PAIRS[0]
    rows, made = answered(pair), prepared(PAIRS[0], [("Add.", TEXTS[0])])
    prompt = rows.prompt(made)
    ids = own_answer(prompt, made, "student")
    numbers = [-0.5 * k for k in range(len(ids))]
    found = rows.row(prompt, ids, ended=True, logprobs=numbers)
    stored = np.frombuffer(found[LOGPROBS], "<f4").tolist()
    said = found["labels"][len(prompt["student"].ids) :]
    assert stored == pytest.approx([x for x, y in zip(numbers, said, strict=True) if y != -100])
    assert len(stored) == sum(y != -100 for y in found["labels"][1:])


def test_a_row_without_prompt_or_answer_has_none():
    rows = answered(PAIRS[0])
    made = prepared(PAIRS[0], [("Add.", TEXTS[0])])
    assert rows.prompt(made | {"labels": [-100] * len(made["labels"])}) is None
