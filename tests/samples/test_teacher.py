"""What a teacher has answered, on disk: whatever runs write it, and at once."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from datasets import Dataset

from axolotl_dskd.config.samples import TeacherSamplesConfig
from axolotl_dskd.data.answers import AnsweredRows
from axolotl_dskd.generation import Answer, prompt_seed
from axolotl_dskd.samples.teacher import TeacherAnswers, _names, _read, _save
from tests.support.conversations import answered, prepared


def answers(keys: range, length: int) -> dict[int, Answer]:
    return {key: Answer([key % 97] * length, [], ended=True) for key in keys}


def read(folder: Path, names: Iterable[str]) -> dict[int, Answer]:
    """What is in files, as it was saved."""
    found = _read(folder, names).items()
    return {key: Answer(kept.ids.tolist(), [], ended=kept.ended) for key, kept in found}


def test_runs_that_write_the_same_answers_at_once_do_not_disturb_each_other(tmp_path: Path):
    rounds, writers = 40, 4
    begin = threading.Barrier(writers)

    def write(_: int) -> None:
        for number in range(rounds):
            begin.wait(timeout=20)
            _save(tmp_path, answers(range(number * 64, number * 64 + 64), 100))

    with ThreadPoolExecutor(writers) as threads:
        for _ in threads.map(write, range(writers)):
            pass
    assert read(tmp_path, _names(tmp_path)) == answers(range(rounds * 64), 100)
    assert {path.name for path in tmp_path.iterdir()} == _names(tmp_path)


def test_answers_of_files_that_begin_alike_are_all_there(tmp_path: Path):
    _save(tmp_path, answers(range(3), 2))
    first = _names(tmp_path)
    _save(tmp_path, answers(range(5), 4))
    assert read(tmp_path, _names(tmp_path)).keys() == set(range(5))
    assert read(tmp_path, first) == answers(range(3), 2)


def test_the_same_files_give_the_same_answers_in_any_order(tmp_path: Path):
    """Two runs may have answered one prompt unlike: all ranks of a third take the same one."""
    for length in range(1, 6):
        _save(tmp_path, answers(range(4), length))
    names = sorted(_names(tmp_path))
    assert len(names) == 5
    assert read(tmp_path, names) == read(tmp_path, names[::-1])


def test_a_damaged_file_is_not_written_yet(tmp_path: Path):
    _save(tmp_path, answers(range(4), 8))
    (name,) = _names(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-5])
    assert read(tmp_path, [name]) == {}
    _save(tmp_path, answers(range(4), 8))
    assert (tmp_path / name).read_bytes() == whole


def test_a_server_that_has_the_teacher_under_another_name_writes_other_answers(tmp_path: Path):
    """It may be an adapter of the teacher, which no file here tells of."""

    class Rows(AnsweredRows):
        def __init__(self) -> None:
            self.end_ids = {"teacher": [2]}
            self.reconcile: Any = SimpleNamespace(teacher_limit=64)

    run: Any = SimpleNamespace(folder=tmp_path, identity=lambda: "the same", answered=Rows)

    def folder(**server: Any) -> Path:
        engine = {"vllm": {"url": "http://127.0.0.1:8000", **server}} if server else "transformers"
        keys = {"from": "teacher", "engine": engine}
        return TeacherAnswers(TeacherSamplesConfig.model_validate(keys), run)._folder()

    assert folder(concurrency=3) == folder(concurrency=4)
    assert len({folder(), folder(concurrency=3), folder(model="math"), folder(model="chat")}) == 3


def test_answered_rows_stand_in_order_and_are_never_all_in_lists_at_once(tmp_path: Path):
    """Of a large data set these would take many times its memory, on every rank."""
    pair, count = ("tiny byte-level", "tiny sentencepiece"), 1000
    said = "Wood, ice and a small paper boat float on water. " * 8
    asks = [f"{said} {question}" * 2 for question in ("What floats?", "Name it.")]
    two = [prepared(pair, [(question, said)]) for question in asks]
    rows = Dataset.from_list(two * (count // 2))
    run: Any = SimpleNamespace(
        folder=tmp_path,
        identity=lambda: "one",
        answered=lambda: answered(pair),
        max_length=4096,
        device=torch.device("cpu"),
    )
    writes = TeacherAnswers(TeacherSamplesConfig.model_validate({"from": "teacher"}), run)
    ids = [label for label in two[0]["teacher_labels"] if label >= 0][:-3]
    asked = [answered(pair).prompt(row) for row in two]
    seeds = [prompt_seed(prompt["teacher"].ids, writes.config.seed) for prompt in asked if prompt]
    writes._folder().mkdir()
    _save(writes._folder(), {seed: Answer(ids, [], ended=True) for seed in seeds})
    tracemalloc.start()
    found = writes(rows)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    numbers = sum(len(row[name]) for row in found for name in ("input_ids", "labels"))
    numbers += sum(len(row[f"teacher_{n}"]) for row in found for n in ("input_ids", "labels"))
    assert most < 14 * numbers  # in lists most have 8 bytes there and 28 of their own
    assert found.features == rows.features
    for number, prompt in enumerate(asked):
        assert prompt is not None
        (row, *others) = found.select(range(number, count, 2))
        assert all(other == row for other in others)
        before = len(prompt["teacher"].ids)
        assert row["teacher_input_ids"][:before] == prompt["teacher"].ids
        assert row["teacher_input_ids"][before : before + len(ids) - 1] == ids[:-1]


def test_each_prompt_has_the_answer_that_was_written_to_it(tmp_path: Path):
    """Also where rows share a prompt, and in whatever order the writer takes them."""
    pair = ("tiny byte-level", "tiny sentencepiece")
    asks = [
        "What floats on water?",
        "Name it.",
        "What floats on water?",
        "And what is made of ice?",
    ]
    said = ["Wood.", "A boat.", "Ice.", "Nothing here."]
    rows = Dataset.from_list([prepared(pair, [turn]) for turn in zip(asks, said, strict=True)])
    prompts = [answered(pair).prompt(row) for row in rows]
    ids = [prompt["teacher"].ids for prompt in prompts if prompt]
    answer_of = {
        tuple(prompt): [label for label in row["teacher_labels"] if label >= 0]
        for prompt, row in zip(ids, rows, strict=True)
    }

    class Writer:
        asked: ClassVar[list[int]] = []

        def write(self, prompts: list[list[int]], _: Any, seeds: list[int]) -> list[Answer]:
            assert seeds == [prompt_seed(prompt, 42) for prompt in prompts]
            self.asked += seeds
            return [Answer(answer_of[tuple(p)][:-1], [], ended=False) for p in prompts]

    run: Any = SimpleNamespace(
        folder=tmp_path,
        identity=lambda: "one",
        answered=lambda: answered(pair),
        max_length=4096,
        device=torch.device("cpu"),
        rank=0,
        writer=lambda *_: Writer(),
    )
    found = TeacherAnswers(TeacherSamplesConfig.model_validate({"from": "teacher"}), run)(rows)
    assert len(Writer.asked) == len(answer_of) == 3
    for prompt, row in zip(ids, found, strict=True):
        written = answer_of[tuple(prompt)][:-1]
        assert row["teacher_input_ids"] == prompt + written
