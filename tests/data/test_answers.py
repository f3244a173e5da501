"""Prompts out of prepared rows, and rows of answers: the same as if the answers had been data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from axolotl_dskd.data.answers import LOGPROBS, NOTHING_WRITTEN, WEIGHTS, AnsweredRows
from axolotl_dskd.data.outcomes import TOO_LONG
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from tests.support.conversations import answered, prepared, reconcile
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


def test_weights_stand_at_their_tokens_also_of_an_answer_that_was_cut():
    pair = PAIRS[0]
    rows, made = answered(pair), prepared(PAIRS[0], [("Add.", TEXTS[0])])
    prompt = rows.prompt(made)
    ids = own_answer(prompt, made, "student")
    numbers = [0.1 * (k + 1) for k in range(len(ids))]
    for count, ended in ((len(ids), True), (len(ids) - 2, False)):
        found = rows.row(prompt, ids[:count], ended=ended, logprobs=[-1.0] * count, weights=numbers)
        stored = np.frombuffer(found[WEIGHTS], "<f4").tolist()
        said = found["labels"][len(prompt["student"].ids) :]
        here = zip(numbers, said, strict=False)
        assert stored == pytest.approx([x for x, y in here if y != -100])
        assert len(stored) == len(found[LOGPROBS]) // 4
    assert WEIGHTS not in rows.row(prompt, ids, ended=True, logprobs=numbers)


def test_an_end_that_the_teacher_alone_has_stands_for_the_students():
    """By id, and none where both end with the same."""
    same = answered(PAIRS[2])
    assert same.teachers_own_ends == {}
    rows = AnsweredRows(
        reconcile(PAIRS[2]),
        *[TOKENIZERS[name]() for name in PAIRS[2]],
        [prepared(PAIRS[2], TURNS[:1])],
    )
    (end,) = rows.end_ids["student"]
    rows.end_ids["teacher"] = [2, end, 4]
    assert rows.teachers_own_ends == {2: end, 4: end}


def test_the_teacher_has_room_behind_its_own_side_of_a_prompt():
    rows = answered(PAIRS[0], limit=50)
    prompt = rows.prompt(prepared(PAIRS[0], TURNS[:1]))
    assert rows.teachers_room(prompt) == 50 - len(prompt["teacher"].ids)


def test_a_row_without_prompt_or_answer_has_none():
    rows = answered(PAIRS[0])
    made = prepared(PAIRS[0], [("Add.", TEXTS[0])])
    assert rows.prompt(made | {"labels": [-100] * len(made["labels"])}) is None


TURNS = [("Say hello.", "Hello there."), ("Tell me more.", TEXTS[1]), ("Add.", TEXTS[0])]


@pairs
def test_each_turn_asks_what_the_conversation_asks_that_ends_with_it(pair):
    rows = answered(pair)
    turns = rows.turns(prepared(pair, TURNS))
    assert len(turns) == len(TURNS)
    for count, turn in enumerate(turns, 1):
        shorter = rows.prompt(prepared(pair, TURNS[:count]))
        for side in ("student", "teacher"):
            assert turn[side].ids == shorter[side].ids
            assert turn[side].text == shorter[side].text
            assert turn[side].end == shorter[side].end


@pairs
def test_a_turn_alone_is_the_row_of_its_own_answer_written_again(pair):
    rows, made = answered(pair), prepared(pair, TURNS)
    for count, turn in enumerate(rows.turns(made), 1):
        shorter = prepared(pair, TURNS[:count])
        ids = own_answer(turn, shorter, "student")
        written = rows.row(turn, ids, ended=ids[-1] in rows.end_ids["student"])
        alone = rows.alone(made, turn)
        assert {column: alone[column] for column in written} == written
        assert len(alone["input_ids"]) <= len(made["input_ids"])


def test_a_row_of_one_turn_is_alone_already():
    rows, made = answered(PAIRS[0]), prepared(PAIRS[0], TURNS[:1])
    assert rows.alone(made, rows.prompt(made)) is made


def test_a_turn_that_the_sides_do_not_share_is_none():
    """Fewer turns on one side, or turns of other texts: the contexts could be others, too."""
    rows, made = answered(PAIRS[0]), prepared(PAIRS[0], TURNS)
    first = rows.turns(made)[0]["teacher"]
    labels = [-100] * (first.stop + len(first.end[0]))
    fewer = made | {"teacher_labels": labels + made["teacher_labels"][len(labels) :]}
    assert [turn["student"].text for turn in rows.turns(fewer)] == [TEXTS[0].encode()]
    other = prepared(PAIRS[0], [("Say hello.", "Good day."), *TURNS[1:]])
    mixed = made | {c: other[c] for c in ("teacher_input_ids", "teacher_labels")}
    texts = [turn["student"].text.strip() for turn in rows.turns(mixed)]
    assert texts == [text.encode() for text in (TEXTS[1], TEXTS[0])]


def test_what_ends_an_earlier_turn_ends_an_answer_too():
    made = prepared(PAIRS[0], TURNS)
    tokenizers = [TOKENIZERS[name]() for name in PAIRS[0]]
    special = tokenizers[0].convert_tokens_to_ids("<|user|>")
    at = answered(PAIRS[0]).turns(made)[0]["student"].stop
    for column in ("input_ids", "labels"):
        made[column] = [*made[column][:at], special, *made[column][at + 1 :]]
    rows = AnsweredRows(reconcile(PAIRS[0]), *tokenizers, [made])
    assert rows.end_ids["student"] == sorted([special, tokenizers[0].eos_token_id])
