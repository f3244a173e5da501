"""Rows that each ask one of several teachers, through Axolotl's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.answers import AnsweredRows, RoutedAnswers
from axolotl_dskd.data.hooks import data_fingerprint, make_reconcile
from axolotl_dskd.data.reconcile import TEACHER
from axolotl_dskd.data.routing import in_their_places, rows_of_teacher
from axolotl_dskd.data.token_bytes import token_bytes
from tests.support import tiny, two_teachers

COUNT = 12
NAMES = list(two_teachers.FOLDERS)
TOKENIZERS = [tiny.sentencepiece_tokenizer(), tiny.byte_level_tokenizer()]
Load = Callable[..., Dataset]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_teachers.save(tmp_path_factory.mktemp("routed"))


@pytest.fixture
def load(folder: Path, tmp_path: Path, validated: Callable[[dict[str, Any]], Any]) -> Load:
    """Prepared rows of a block: of raw rows by the name of a file."""

    def run(block: dict[str, Any], files: dict[str, Any], **overrides: Any) -> Dataset:
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.common.datasets import load_datasets

        data = [
            {
                "path": str(tiny.write_rows(tmp_path / name, rows)),
                "ds_type": "json",
                "type": "chat_template",
            }
            for name, rows in files.items()
        ]
        prepared = str(tmp_path / "prepared")
        config = tiny.base_config(
            folder, dskd=block, datasets=data, dataset_prepared_path=prepared, **overrides
        )
        return load_datasets(cfg=validated(config), cli_args=TrainerCliArgs()).train_dataset

    return run


def alone(folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    return {"teacher": {"base_model": str(folder / two_teachers.FOLDERS[name]), **keys}}


def plain(dataset: Dataset) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != TEACHER} for row in dataset]


def test_each_row_is_prepared_as_with_its_teacher_alone(folder: Path, load: Load):
    rows = two_teachers.rows(COUNT)
    both = load(two_teachers.block(folder), {"rows.jsonl": rows})
    assert both[TEACHER][:] == [0, 1] * (COUNT // 2)  # in their order
    for number, name in enumerate(NAMES):
        mine = load(alone(folder, name), {f"{name}.jsonl": rows[number::2]})
        assert plain(rows_of_teacher(both, number)) == plain(mine)


def test_a_data_set_may_name_the_teacher_of_all_its_rows(folder: Path, load: Load, tmp_path: Path):
    rows = tiny.chat_rows(COUNT)
    files = {"a.jsonl": rows[:8], "b.jsonl": rows[8:]}
    route = {"datasets": {str(tmp_path / "a.jsonl"): "chat", str(tmp_path / "b.jsonl"): "math"}}
    both = load(two_teachers.block(folder, route=route), files)
    assert both[TEACHER][:] == [1] * 8 + [0] * 4
    assert plain(rows_of_teacher(both, 1)) == plain(load(alone(folder, "chat"), {"c": rows[:8]}))


def test_completions_are_cut_for_each_teacher(folder: Path, validated: Any, tmp_path: Path):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets

    rows = [{"text": tiny.CORPUS[k] * 3, two_teachers.FIELD: NAMES[k % 2]} for k in range(4)]
    path = tiny.write_rows(tmp_path / "texts.jsonl", rows)
    data = [{"path": str(path), "ds_type": "json", "type": "completion"}]
    config = tiny.base_config(
        folder,
        dskd=two_teachers.block(folder),
        datasets=data,
        sequence_len=48,
        dataset_prepared_path=str(tmp_path / "prepared"),
    )
    made = load_datasets(cfg=validated(config), cli_args=TrainerCliArgs()).train_dataset
    assert len(made) > len(rows)
    assert set(made[TEACHER][:]) == {0, 1}
    for row in made:
        table = token_bytes(TOKENIZERS[row[TEACHER]])
        ours = b"".join(token_bytes(TOKENIZERS[1])[i] for i in row["labels"][1:] if i >= 0)
        theirs = b"".join(table[i] for i in row["teacher_labels"][1:] if i >= 0)
        assert ours.strip() == theirs.strip()


def test_rows_that_name_no_teacher_are_refused_with_examples(folder: Path, load: Load):
    rows = two_teachers.rows(COUNT)
    rows[2][two_teachers.FIELD] = "maths"
    rows[5][two_teachers.FIELD] = None
    with pytest.raises(
        ValueError, match=r"2 of 12 rows .*row 2 has 'maths'; row 5 has None\. The .* math, chat"
    ):
        load(two_teachers.block(folder), {"rows.jsonl": rows})


def test_rows_without_the_column_are_refused(folder: Path, load: Load):
    with pytest.raises(ValueError, match=r"no column 'task'.*it has messages"):
        load(two_teachers.block(folder), {"rows.jsonl": tiny.chat_rows(4)})


def test_rows_that_one_teacher_cannot_read_are_dropped_and_the_others_stay_in_order(
    folder: Path, load: Load
):
    rows = two_teachers.rows(COUNT)
    whole = load(two_teachers.block(folder), {"rows.jsonl": rows})
    block = two_teachers.block(folder)
    lengths = [len(row["teacher_input_ids"]) for row in whole]
    limit = sorted(lengths[0::2])[COUNT // 4]
    block["teachers"]["math"]["sequence_len"] = limit
    fewer = load(block, {"rows.jsonl": rows})
    kept = [row for row in whole if row in list(fewer)]
    assert list(fewer) == kept
    assert kept[-1] == whole[COUNT - 1]
    assert fewer[TEACHER][:].count(1) == COUNT // 2
    assert 0 < fewer[TEACHER][:].count(0) < COUNT // 2


def test_what_is_wrong_with_one_teachers_rows_is_said_with_its_name(folder: Path, load: Load):
    block = two_teachers.block(folder)
    block["teachers"]["math"]["chat_template_jinja"] = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | upper + eos_token }}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"dskd\.teachers\.math: 5 of 6 rows do not have the same"):
        load(block, {"rows.jsonl": two_teachers.rows(COUNT)})


def test_rows_taken_apart_and_put_back_are_as_they_were():
    rows = Dataset.from_dict({TEACHER: [2, 0, 1, 0, 2, 2], "x": list(range(6))})
    parts = [rows_of_teacher(rows, number) for number in range(4)]
    assert [part["x"][:] for part in parts] == [[1, 3], [2], [0, 4, 5], []]
    assert list(in_their_places(parts, rows)) == list(rows)
    assert rows_of_teacher(concatenate_datasets([rows.remove_columns(TEACHER)]), 3)["x"][:] == [
        *range(6)
    ]


def test_the_key_of_prepared_rows_knows_teachers_and_route(folder: Path):
    def key(**keys: Any) -> str:
        return data_fingerprint(DSKDConfig.model_validate(two_teachers.block(folder, **keys)))

    block = two_teachers.block(folder)
    turned = {name: block["teachers"][name] for name in reversed(NAMES)}
    same = dict.fromkeys(NAMES, block["teachers"]["math"])
    short = block["teachers"] | {"chat": block["teachers"]["chat"] | {"sequence_len": 64}}
    keys = [
        key(),
        key(teachers=turned),  # rows carry numbers
        key(teachers=same),
        key(teachers=short),
        key(route={"field": "topic"}),
        key(route={"datasets": {"a": "math"}}),
        data_fingerprint(DSKDConfig.model_validate(alone(folder, "math"))),
    ]
    assert len(set(keys)) == len(keys)
    assert key(objective="uld", kd_ratio=0.2) == keys[0]


def test_an_answer_goes_into_the_template_of_the_prompts_own_teacher(folder: Path, load: Load):
    student = tiny.byte_level_tokenizer()
    rows = load(two_teachers.block(folder), {"rows.jsonl": two_teachers.rows(COUNT)})
    config = DSKDConfig.model_validate(two_teachers.block(folder))
    answers = RoutedAnswers(
        [
            AnsweredRows(
                make_reconcile(one, student, truncate_teacher=False),
                student,
                TOKENIZERS[number],
                rows_of_teacher(rows, number),
                number,
            )
            for number, one in enumerate(config.each().values())
        ]
    )
    assert answers.prompts == COUNT
    assert answers.end_ids == {"student": [student.eos_token_id]}
    said = "Because a boat floats: ∑"
    ids = student(said)["input_ids"]
    for row in rows:
        prompt = answers.prompt(row)
        assert prompt is not None
        made = answers.row(prompt, [*ids, student.eos_token_id], ended=True)
        assert not isinstance(made, str), made
        assert made[TEACHER] == row[TEACHER]
        before = prompt["teacher"].ids
        assert made["teacher_input_ids"][: len(before)] == row["teacher_input_ids"][: len(before)]
        table = token_bytes(TOKENIZERS[row[TEACHER]])
        text = b"".join(table[i] for i in made["teacher_input_ids"][len(before) :])
        assert text.decode().strip() == said
