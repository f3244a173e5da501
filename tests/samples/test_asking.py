"""Which of a conversation's answers a step asks for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.generation import Sampling
from axolotl_dskd.samples.asking import NO_ROOM, Asking
from axolotl_dskd.samples.tally import Tally
from tests.support.conversations import answered, prepared

PAIR = ("tiny byte-level", "tiny sentencepiece")
TURNS = [("Say hello.", "Hello there."), ("Tell me more.", "Wood and ice."), ("Add.", "Five.")]
STEPS = 300


def asking(turns: str, *, max_length: int = 4096, contrast: bool = False, **keys: Any) -> Asking:
    config = StudentSamplesConfig.model_validate({"from": "student", "turns": turns, **keys})
    sampling = Sampling(16, max_length=max_length)
    return Asking(config, answered(PAIR), sampling, contrast, Tally())


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return prepared(PAIR, TURNS)


def asked(ask: Asking, row: dict[str, Any], steps: int = STEPS) -> list[int]:
    """The number of the turn that each step asks for."""
    each = [turn["student"].ids for turn in ask.answered.turns(row)]
    prompts = [ask.prompt(row, step) for step in range(steps)]
    return [each.index(prompt["student"].ids) for prompt in prompts if prompt is not None]


def test_the_last_turn_alone_or_each_as_often(row: dict[str, Any]):
    assert {*asked(asking("last"), row)} == {2}
    counts = Counter(asked(asking("all"), row))
    assert len(counts) == 3
    assert all(STEPS / 3 * 0.75 < count < STEPS / 3 * 1.25 for count in counts.values())


def test_seed_step_and_row_decide_and_nothing_else(row: dict[str, Any]):
    other = prepared(PAIR, [("Greet me.", "Hi."), *TURNS[1:]])
    alone = [asking("all")([[row]], step)[0] for step in range(40)]
    packed = [asking("all")([[other], [other, row, other]], step)[2] for step in range(40)]
    assert [p.prompt["student"].ids for p in alone] == [p.prompt["student"].ids for p in packed]
    assert [place.seed for place in alone] == [place.seed for place in packed]
    assert asked(asking("all"), row) != asked(asking("all"), other)
    assert asked(asking("all"), row) != asked(asking("all", seed=1), row)


def test_answers_to_one_prompt_are_to_one_turn(row: dict[str, Any]):
    ask = asking("all", per_prompt=3)
    for step in range(20):
        places = ask([[row], [row], [row]], step)
        assert len({tuple(place.prompt["student"].ids) for place in places}) == 1
        assert len({place.seed for place in places}) == 3


def test_a_turn_without_room_is_not_asked_for(row: dict[str, Any]):
    """And a conversation that has room for none is counted."""
    lengths = [len(turn["student"].ids) for turn in answered(PAIR).turns(row)]
    assert {*asked(asking("all", max_length=lengths[1] + 1), row)} == {0, 1}
    ask = asking("all", max_length=lengths[0])
    assert ask([[row]], 0) == []
    assert ask.tally.refused == {NO_ROOM: 1}


def test_a_turn_that_the_teacher_cannot_read_is_not_asked_for_where_it_takes_part(
    row: dict[str, Any],
):
    pair = (PAIR[0], PAIR[0])
    row = prepared(pair, TURNS)
    lengths = [len(turn["teacher"].ids) for turn in answered(pair).turns(row)]

    def of_limit(limit: int, mix: float) -> Asking:
        config = {"from": "student", "turns": "all", "teacher_mix": mix}
        keys = StudentSamplesConfig.model_validate(config)
        return Asking(keys, answered(pair, limit), Sampling(16), False, Tally())

    assert {*asked(of_limit(lengths[1] + 1, 0.2), row)} == {0, 1}
    assert {*asked(of_limit(lengths[1] + 1, 0.0), row)} == {0, 1, 2}
    ask = of_limit(lengths[0], 0.2)
    assert ask([[row]], 0) == []
    assert ask.tally.refused == {NO_ROOM: 1}


def test_beside_a_written_turn_stands_the_datas_answer_to_it_alone(row: dict[str, Any]):
    ask = asking("all", contrast=True)
    seen = set()
    for step in range(20):
        (place,) = ask([[row, row]], step)
        assert place.preferred is not None
        prompt, kept = place.prompt["student"].ids, place.preferred.row
        assert kept["input_ids"][: len(prompt)] == prompt
        assert {*kept["labels"][: len(prompt)]} == {-100}
        assert kept["labels"][len(prompt)] != -100
        seen.add(len(prompt))
    assert len(seen) == 3
