"""The tokens with which turns end are each other's, whatever a tokenizer calls its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from axolotl_dskd.data.token_bytes import ends, shared_tokens, translation
from axolotl_dskd.data.tokenizers import ends_of
from tests.support import tiny
from tests.support.runs import dskd, losses, objective_of

END = "<|end|>"


def test_rows_say_with_which_tokens_turns_end():
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    end, pad, word = (student.convert_tokens_to_ids(t) for t in (END, "<|pad|>", "e"))
    rows = [([word, end, -100], [99, 2]), ([end], [2]), ([pad], [2]), ([word], [99]), ([-100], [2])]
    found = ends_of([{"labels": a, "teacher_labels": b} for a, b in rows], student, teacher)
    assert found == (end, 2)
    assert ends_of([{"labels": [word], "teacher_labels": [2]}], student, teacher) is None


def test_they_are_each_others_and_the_ends_of_sequence_where_these_are_others():
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    eos = student.eos_token_id, teacher.eos_token_id
    pad, bos = student.convert_tokens_to_ids("<|pad|>"), teacher.bos_token_id
    assert ends(student, teacher) == [eos]
    for turn_ends, expected in (
        ((pad, bos), [(pad, bos), eos]),
        ((pad, eos[1]), [(pad, eos[1])]),
        ((eos[0], bos), [(eos[0], bos)]),
    ):
        assert ends(student, teacher, turn_ends) == expected
        ours, theirs = shared_tokens(student, teacher, turn_ends)
        assert [*zip(ours, theirs, strict=True)][-len(expected) :] == expected
        assert len({*ours}) == len(ours)
        assert len({*theirs}) == len(theirs)
        table = translation(student, teacher, turn_ends=turn_ends)
        assert all(table[a] == b for a, b in expected)
    assert translation(student, teacher, turn_ends=(pad, eos[1]))[eos[0]] == -100


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "gold"},
        {"name": "min_edit", "map": "first_token"},
        {"name": "span_support"},
        {"name": "dual_space", "alignment": "eta"},
    ],
    ids=lambda objective: objective["name"],
)
def test_what_the_tokenizer_calls_its_end_of_sequence_changes_nothing(
    pair_folder: Path, train: Callable[..., Any], objective: dict[str, Any]
):
    """A template whose turns end with a token of its own, as Gemma's and Phi-3's."""

    def trained(name: str) -> Any:
        cfg = tiny.base_config(
            pair_folder,
            dskd=dskd(pair_folder, **objective),
            eot_tokens=[END],
            val_set_size=0.25,
            eval_steps=2,
            output_dir=str(pair_folder / name),
        )
        return train(cfg)[1]

    like = trained("like")
    tokenizer = AutoTokenizer.from_pretrained(pair_folder / "student")
    tokenizer.eos_token = "<|system|>"
    tokenizer.save_pretrained(pair_folder / "student")
    found = trained("found")
    end = tokenizer.convert_tokens_to_ids(END)
    assert found.processing_class.eos_token_id != end
    assert objective_of(found).facts.turn_ends == (end, 2)
    assert losses(found) == losses(like)
    ours, theirs = (
        [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (found, like)
    )
    assert [e["eval_dskd/teacher_kl"] for e in ours] == [e["eval_dskd/teacher_kl"] for e in theirs]
    assert theirs
