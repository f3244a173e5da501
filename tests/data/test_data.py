"""Axolotl's data pipeline with the plugin: its rows untouched, a teacher's side beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from axolotl_dskd.config import ObjectiveConfig
from axolotl_dskd.data.byte_spans import Spans, exact_pairs
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.data.tokenizers import exact_share
from tests.support import tiny

Load = Callable[..., tuple[Dataset, Dataset | None]]
ANSWERS = [answer for _, answer in tiny.QUESTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and teacher of different tokenizers, and variants of both."""
    folder = tmp_path_factory.mktemp("pair")
    student, teacher = tiny.save_pair(folder)
    # A tokenizer that writes its own end token, which has no place in the text.
    shutil.copytree(student, folder / "student-with-end")
    file = folder / "student-with-end" / "tokenizer.json"
    spec = json.loads(file.read_text())
    end = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence, end],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [1], "tokens": ["<|end|>"]}},
    }
    file.write_text(json.dumps(spec))
    shutil.copytree(teacher, folder / "teacher-without-template")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher-without-template")
    tokenizer.chat_template = None
    shutil.rmtree(folder / "teacher-without-template")
    shutil.copytree(teacher, folder / "teacher-without-template")
    for leftover in folder.glob("teacher-without-template/*token*"):
        leftover.unlink()
    (folder / "teacher-without-template" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder / "teacher-without-template")
    return folder


@pytest.fixture(autouse=True)
def saved_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_to_disk` with one process would start that one anew, which takes seconds each time."""
    save = Dataset.save_to_disk

    def save_here(self: Dataset, path: str, *, num_proc: int, **kwargs: Any) -> None:
        save(self, path, num_proc=None if num_proc == 1 else num_proc, **kwargs)

    monkeypatch.setattr(Dataset, "save_to_disk", save_here)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A config over rows of one type; `dskd=None` makes it a plain run of Axolotl."""

    def make(rows: list[dict[str, Any]], kind: Any = None, **overrides: Any) -> dict[str, Any]:
        data = tiny.write_rows(tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl", rows)
        dataset = {"path": str(data), "ds_type": "json", **(kind or {"type": "chat_template"})}
        overrides = {
            "datasets": [dataset],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "num_dataset_shards_to_save": 1,
            **overrides,
        }
        if "dskd" in overrides and overrides["dskd"] is None:
            overrides["plugins"] = None
        return tiny.base_config(folder, **overrides)

    return make


@pytest.fixture
def load(validated: Callable[[dict[str, Any]], Any]) -> Load:
    """(train, eval) of a config, as `axolotl train` gets them."""

    def run(config: dict[str, Any]) -> tuple[Dataset, Dataset | None]:
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.common.datasets import load_datasets

        meta = load_datasets(cfg=validated(config), cli_args=TrainerCliArgs())
        return meta.train_dataset, meta.eval_dataset

    return run


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The same run without us."""
    return {key: value for key, value in config.items() if key not in ("dskd", "plugins")}


STUDENT, TEACHER = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()


def texts(row: dict[str, Any]) -> tuple[str, str]:
    """What student and teacher are supervised on."""
    sides = (
        (row["input_ids"], row["labels"], token_bytes(STUDENT)),
        (row["teacher_input_ids"], row["teacher_labels"], token_bytes(TEACHER)),
    )
    spelled = []
    for ids, labels, table in sides:
        assert len(ids) == len(labels)
        pairs = list(zip(ids, labels, strict=True))[1:]
        assert all(y in (-100, i) for i, y in pairs)
        spelled.append(b"".join(table[y] for _, y in pairs if y != -100).decode(errors="replace"))
    return spelled[0], spelled[1]


def squeezed(text: str) -> str:
    return text.replace(" ", "")


def check_against_plain(rows: Dataset, without: Dataset, head: int = 1) -> None:
    """The student's columns are Axolotl's own, but for labels among the first `head` tokens.

    Nothing predicts a row's first token. Where it was labelled, the teacher's tokens of the same
    letters, and with them the student's next few, are unsupervised as well.
    """
    assert rows["input_ids"][:] == without["input_ids"][:]
    assert rows["attention_mask"][:] == without["attention_mask"][:]
    for ours, theirs in zip(rows["labels"], without["labels"], strict=True):
        assert ours[head:] == theirs[head:]
        assert all(x in (-100, y) for x, y in zip(ours, theirs, strict=True))


QA = [{"question": f"{q} ({i})", "answer": a} for i, (q, a) in enumerate(tiny.QUESTIONS)]
ALPACA = [
    {"instruction": r["question"], "input": "Briefly." if i % 2 else "", "output": r["answer"]}
    for i, r in enumerate(QA)
]
SEGMENTS = [
    {
        "segments": [
            {"text": r["question"] + "\n", "label": False},
            {"text": r["answer"], "label": True},
            {"text": " Well.\n", "label": False},
            {"text": "That is", "label": True},
            {"text": "all.", "label": True},
        ]
    }
    for r in QA
]
BLOCK = {
    "field_instruction": "question",
    "field_output": "answer",
    "format": "Q: {instruction} {input}\nA:",
    "no_input_format": "Q: {instruction}\nA:",
}
KINDS = {
    "alpaca": (ALPACA, {"type": "alpaca"}, "### Response:"),
    "alpaca_chat": (QA, {"type": "alpaca_chat.load_qa"}, "ASSISTANT:"),
    "input_output": (SEGMENTS, {"type": "input_output"}, "Well."),
    "block": (QA, {"type": BLOCK}, "\nA:"),
    "own module": (QA, {"type": "tests.support.own_strategy"}, " STOP"),
    "completion": ([{"text": r["answer"]} for r in QA], {"type": "completion"}, ""),
    "completion of a field": (QA, {"type": "completion", "field": "answer"}, ""),
    "chat_template": (tiny.chat_rows(8), {"type": "chat_template"}, "[user]\n"),
}


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_each_type_gets_a_teacher_side_of_the_same_text(
    name: str, train_on_inputs: bool, config: Any, load: Load
) -> None:
    rows, kind, mark = KINDS[name]
    settings = config(rows, kind, train_on_inputs=train_on_inputs)
    ours, _ = load(settings)
    without, _ = load(plain(settings))
    assert len(ours) == len(rows)
    from_the_start = name.startswith("completion") or train_on_inputs
    check_against_plain(ours, without, head=12 if from_the_start else 1)
    for number, row in enumerate(ours):
        student, teacher = texts(row)
        assert squeezed(student) == squeezed(teacher)
        if not name.startswith("completion"):
            assert squeezed(ANSWERS[number]) in squeezed(student)
        whole = TEACHER.decode(row["teacher_input_ids"])
        assert mark in whole
        assert whole.startswith("<s>") == (name != "input_output")
        # Both end with their own end token, supervised.
        if name != "input_output":
            assert row["labels"][-1] == STUDENT.eos_token_id
            assert row["teacher_labels"][-1] == TEACHER.eos_token_id


def test_completion_without_its_first_token_is_the_whole_text(config: Any, load: Load) -> None:
    ours, _ = load(config([{"text": a} for a in ANSWERS], {"type": "completion"}))
    for answer, row in zip(ANSWERS, ours, strict=True):
        student, teacher = texts(row)
        assert student.lstrip(" ") == teacher.lstrip(" ")
        assert answer.endswith(student.strip(" \ufffd"))
        assert len(answer) - len(student) < 12


@pytest.mark.parametrize("student", ["student", "student-with-end"])
def test_long_completions_become_chunks_of_the_same_text(
    student: str, config: Any, load: Load, folder: Path
) -> None:
    body = "Water boils, naïve 😀👩‍👩‍👧 你好世界, because its molecules move.\n\tFast  enough! "
    rows = [{"text": f"{body * 5}{i}"} for i in range(3)] + [{"text": "A short one."}]
    settings = config(
        rows,
        {"type": "completion"},
        sequence_len=64,
        base_model=str(folder / student),
        excess_length_strategy="drop",
    )
    ours, _ = load(settings)
    without, _ = load(plain(settings))
    assert ours["input_ids"][:] == without["input_ids"][:]
    assert len(ours) > 3 * 4
    supervised = 0
    for row in ours:
        student_text, teacher_text = texts(row)
        assert student_text.lstrip(" ") == teacher_text.lstrip(" ")
        assert any(student_text.strip(" \ufffd") in r["text"] for r in rows)
        supervised += len(student_text.encode())
    assert supervised > 0.85 * sum(len(r["text"].encode()) for r in rows)


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief.", "train": False},
        {"role": "user", "content": "Why is the sky blue?", "train": True},
        {"role": "assistant", "content": "Air scatters blue light.", "train": False},
        {"role": "user", "content": "And at night?", "train": False},
        {"role": "assistant", "content": "It is black.", "train": True},
    ]
}
CHAT_CASES = {
    "default": ({}, "Airscattersbluelight.Itisblack.", 2),
    "users": ({"roles_to_train": ["user"]}, "Whyistheskyblue?Andatnight?", 0),
    "users and assistants": (
        {"roles_to_train": ["user", "assistant"]},
        "Whyistheskyblue?Airscattersbluelight.Andatnight?Itisblack.",
        2,
    ),
    "per turn": ({"message_field_training": "train"}, "Whyistheskyblue?Itisblack.", 1),
    "eos turn": ({"train_on_eos": "turn"}, "Airscattersbluelight.Itisblack.", 2),
    "eos last": ({"train_on_eos": "last"}, "Airscattersbluelight.Itisblack.", 1),
    "eos all": ({"train_on_eos": "all"}, "Airscattersbluelight.Itisblack.", 2),
    "eos none": ({"train_on_eos": "none"}, "Airscattersbluelight.Itisblack.", 0),
    "eos of all turns, one trained": (
        {"train_on_eos": "all", "message_field_training": "train"},
        "Whyistheskyblue?Itisblack.",
        2,
    ),
}


@pytest.mark.parametrize("name", CHAT_CASES)
def test_chat_options_choose_the_same_text_on_both_sides(
    name: str, config: Any, load: Load
) -> None:
    options, expected, ends = CHAT_CASES[name]
    settings = config([CONVERSATION] * 3, {"type": "chat_template", **options})
    ours, _ = load(settings)
    without, _ = load(plain(settings))
    check_against_plain(ours, without)
    for row in ours:
        assert tuple(map(squeezed, texts(row))) == (expected, expected)
        assert row["labels"].count(STUDENT.eos_token_id) == ends
        assert row["teacher_labels"].count(TEACHER.eos_token_id) == ends


def test_each_side_is_in_its_own_chat_template(config: Any, load: Load) -> None:
    ours, _ = load(config(tiny.chat_rows(3)))
    row = ours[0]
    question, answer = tiny.QUESTIONS[0]
    assert STUDENT.decode(row["input_ids"]) == (
        f"<|user|>{question} (0)<|assistant|>{answer}<|end|>"
    )
    # Nothing is read after the last supervised token.
    assert squeezed(TEACHER.decode(row["teacher_input_ids"])) == squeezed(
        f"<s>[user]\n{question} (0)\n[assistant]\n{answer}</s>"
    )


@pytest.mark.parametrize("as_file", [False, True])
def test_the_teachers_template_can_be_given(
    as_file: bool, config: Any, load: Load, folder: Path, tmp_path: Path
) -> None:
    jinja = (
        "{% for m in messages %}{{ 'QA:' + m['role'] + ':' + m['content'] + eos_token }}"
        "{% endfor %}"
    )
    file = tmp_path / "own.jinja"
    file.write_text(jinja)
    teacher = {
        "base_model": str(folder / "teacher"),
        "chat_template_jinja": str(file) if as_file else jinja,
    }
    settings = config(tiny.chat_rows(3), dskd={"teacher": teacher})
    ours, _ = load(settings)
    check_against_plain(ours, load(plain(settings))[0])
    for row in ours:
        assert "QA:assistant:" in TEACHER.decode(row["teacher_input_ids"]).replace(" :", ":")


def test_a_students_template_in_the_yaml_is_not_the_teachers(config: Any, load: Load) -> None:
    settings = config(tiny.chat_rows(3), chat_template="chatml")
    ours, _ = load(settings)
    check_against_plain(ours, load(plain(settings))[0])
    for row in ours:
        assert "<|im_start|>" in STUDENT.decode(row["input_ids"])
        whole = TEACHER.decode(row["teacher_input_ids"])
        assert "[user]" in whole
        assert "im_start" not in whole


def test_several_datasets_of_different_types(config: Any, load: Load, tmp_path: Path) -> None:
    more = tiny.write_rows(tmp_path / "alpaca.jsonl", ALPACA)
    settings = config(tiny.chat_rows(4))
    settings["datasets"].append({"path": str(more), "ds_type": "json", "type": "alpaca"})
    ours, _ = load(settings)
    check_against_plain(ours, load(plain(settings))[0])
    marks = ["[user]" in TEACHER.decode(row["teacher_input_ids"]) for row in ours]
    assert marks == [True] * 4 + [False] * len(ALPACA)


def test_evaluation_rows_have_both_sides_too(config: Any, load: Load, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "held-out.jsonl", ALPACA[:3])
    held_out = [{"path": str(rows), "ds_type": "json", "type": "alpaca", "split": "train"}]
    train, held = load(config(tiny.chat_rows(4), test_datasets=held_out))
    assert len(train) == 4
    assert held is not None
    assert [squeezed(texts(row)[1]) for row in held] == [squeezed(a) for a in ANSWERS[:3]]

    settings = config(tiny.chat_rows(12), val_set_size=0.25)
    train, held = load(settings)
    plain_train, plain_held = load(plain(settings))
    assert held is not None
    assert plain_held is not None
    assert (len(train), len(held)) == (9, 3)
    check_against_plain(train, plain_train)
    check_against_plain(held, plain_held)
    assert all(squeezed(texts(row)[0]) == squeezed(texts(row)[1]) for row in held)


def test_the_share_of_exact_pairs_is_counted_over_the_rows(config: Any, load: Load) -> None:
    rows, _ = load(config(tiny.chat_rows(8)))
    both = [[Spans.from_bytes(row[c]) for c in (SPANS, TEACHER_SPANS)] for row in rows]
    pairs = sum(len(exact_pairs(*sides)[0]) for sides in both)
    share = exact_share(rows)
    assert share == pairs / sum(len(ours) for ours, _ in both)
    assert share is not None
    assert 0.1 < share < 0.9
    assert exact_share(rows.select([])) is None
    assert exact_share(rows.remove_columns(SPANS)) is None
    assert exact_share(None) is None


def test_one_vocabulary_has_spans_too_and_pairs_everything(
    config: Any, load: Load, folder: Path
) -> None:
    teacher = {"base_model": str(folder / "teacher"), "tokenizer": str(folder / "student")}
    rows, _ = load(config(tiny.chat_rows(4), dskd={"teacher": teacher}))
    assert exact_share(rows) == 1
    assert rows[SPANS][:] == rows[TEACHER_SPANS][:]


def test_packing_prepares_the_same_rows(config: Any, load: Load) -> None:
    rows = tiny.chat_rows(16)
    padded, _ = load(config(rows))
    packed, _ = load(config(rows, sample_packing=True))
    assert "position_ids" in packed.column_names
    for column in padded.column_names:
        assert packed[column][:] == padded[column][:], column


@pytest.mark.slow
def test_two_processes_prepare_the_same_rows(config: Any, load: Load, tmp_path: Path) -> None:
    settings = config(tiny.chat_rows(16))
    one, _ = load(settings)
    two, _ = load(
        {**settings, "dataset_num_proc": 2, "dataset_prepared_path": str(tmp_path / "two")}
    )
    assert two.to_list() == one.to_list()


# ---- lengths -------------------------------------------------------------------------------

LONG_ANSWER = "Water boils at one hundred degrees because its molecules move fast enough. " * 20
LIMIT = 160  # teacher tokens: the eight short rows have up to 145, the long one 201
LONG_ROWS = [*ALPACA, {"instruction": "Why?", "input": "", "output": LONG_ANSWER}]


def _with_limit(folder: Path, limit: int) -> dict[str, Any]:
    return {"teacher": {"base_model": str(folder / "teacher"), "sequence_len": limit}}


def test_rows_too_long_for_the_teacher_are_dropped(config: Any, load: Load, folder: Path) -> None:
    settings = config(
        LONG_ROWS, {"type": "alpaca"}, sequence_len=1024, dskd=_with_limit(folder, LIMIT)
    )
    assert len(load(plain(settings))[0]) == len(LONG_ROWS)
    assert len(load(settings)[0]) == len(ALPACA)


def test_truncate_cuts_both_sides_to_the_same_text(config: Any, load: Load, folder: Path) -> None:
    kind = {"type": "alpaca"}
    for ours_len, limit in ((150, 512), (512, 150), (150, 150)):
        settings = config(
            LONG_ROWS,
            kind,
            sequence_len=ours_len,
            excess_length_strategy="truncate",
            dskd=_with_limit(folder, limit),
            dataset_prepared_path=None,
        )
        ours, _ = load(settings)
        without, _ = load(plain(settings))
        assert ours["input_ids"][:] == without["input_ids"][:]
        assert len(ours) == len(LONG_ROWS)
        student, teacher = texts(ours[-1])
        assert student.strip(" ") == teacher.strip(" ")
        assert LONG_ANSWER.startswith(student.strip(" "))
        assert 20 < len(student) < len(LONG_ANSWER)
        assert STUDENT.eos_token_id not in ours[-1]["labels"]
        assert TEACHER.eos_token_id not in ours[-1]["teacher_labels"]


def test_raise_names_the_teachers_length(config: Any, load: Load, folder: Path) -> None:
    settings = config(
        LONG_ROWS,
        {"type": "alpaca"},
        sequence_len=1024,
        excess_length_strategy="raise",
        dskd=_with_limit(folder, LIMIT),
    )
    with pytest.raises(ValueError, match=rf"1 of 9 rows have more than {LIMIT} teacher tokens"):
        load(settings)


def test_nothing_left_after_axolotls_own_dropping_is_said(config: Any, load: Load) -> None:
    with pytest.raises(ValueError, match=r"no row is left to distil on.*sequence_len"):
        load(config(LONG_ROWS[-1:], {"type": "alpaca"}, sequence_len=32))


# ---- the cache of prepared rows ------------------------------------------------------------


def _key(cfg: Any) -> str:
    from axolotl.utils.data import sft

    return sft.generate_dataset_hash_from_config(cfg, cfg.datasets, "student")


def test_the_cache_key_knows_what_decides_the_teachers_side(
    config: Any, validated: Any, folder: Path, tmp_path: Path
) -> None:
    settings = config(tiny.chat_rows(4))
    teacher = settings["dskd"]["teacher"]
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}")

    def key(**changes: Any) -> str:
        return _key(validated({**settings, "dskd": {"teacher": {**teacher, **changes}}}))

    keys = {
        "plain": _key(validated(plain(settings))),
        "dskd": key(),
        "tokenizer": key(tokenizer=str(folder / "student")),
        "template": key(chat_template="chatml"),
        "limit": key(sequence_len=100),
        "end of turn": key(eot_tokens=["</s>"]),
        "file": key(chat_template_jinja=str(file)),
        "truncate": _key(validated({**settings, "excess_length_strategy": "truncate"})),
    }
    file.write_text("{{ messages[-1]['content'] }}")
    keys["another file of that name"] = key(chat_template_jinja=str(file))
    assert len(set(keys.values())) == len(keys), keys
    assert key() == keys["dskd"]
    ratio_zero = validated({**settings, "dskd": {**settings["dskd"], "kd_ratio": 0.0}})
    assert _key(ratio_zero) == keys["dskd"]  # plain fine-tuning on the rows of a distillation


@pytest.mark.parametrize(
    "block",
    [
        *({"objective": name} for name in sorted(ObjectiveConfig.known) if "." not in name),
        *({"objective": {"alignment": alignment}} for alignment in ("positions", "eta", "cma")),
        {"objective": {"alignment": "cma", "causal": True}},
        {"kd_ratio": 0.25, "objective": {"divergence": "reverse_kl"}},
    ],
)
def test_all_objectives_share_one_prepared_data_set(
    block: dict[str, Any], config: Any, validated: Any
) -> None:
    settings = config(tiny.chat_rows(4))
    other = {**settings, "dskd": {**settings["dskd"], **block}}
    assert _key(validated(other)) == _key(validated(settings))


def test_a_second_load_comes_from_the_prepared_folder(
    config: Any, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.utils.data import sft

    settings = config(tiny.chat_rows(6))
    first, _ = load(settings)
    monkeypatch.setattr(sft, "_load_raw_datasets", None)  # calling it would fail
    second, _ = load(settings)
    assert second.to_list() == first.to_list()
    assert {"teacher_input_ids", "teacher_labels"} <= set(second.column_names)


def test_a_plain_run_in_the_same_process_is_untouched(config: Any, load: Load) -> None:
    settings = config(tiny.chat_rows(6))
    ours, _ = load(settings)
    without, _ = load(plain(settings))
    ratio_zero, _ = load({**settings, "dskd": {**settings["dskd"], "kd_ratio": 0.0}})
    assert "teacher_labels" in ours.column_names
    assert sorted(without.column_names) == ["attention_mask", "input_ids", "labels"]
    assert ratio_zero.to_list() == ours.to_list()
    assert load(settings)[0].to_list() == ours.to_list()


def test_hooks_are_installed_once() -> None:
    from axolotl.utils.data import sft

    from axolotl_dskd.data.hooks import install_hooks

    install_hooks()
    names = "get_dataset_wrapper generate_dataset_hash_from_config handle_long_seq_in_dataset"
    before = [getattr(sft, name) for name in names.split()]
    install_hooks()
    assert [getattr(sft, name) for name in names.split()] == before


# ---- what is refused -----------------------------------------------------------------------


def test_tokenized_data_is_refused(config: Any, load: Load) -> None:
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]}] * 3
    with pytest.raises(ValueError, match=r"rows-\d+\.jsonl is already tokenized.*raw text"):
        load(config(rows))


def test_an_unknown_type_is_refused_by_axolotl(config: Any, load: Load) -> None:
    with pytest.raises(ValueError, match="unhandled prompt tokenization strategy: no_such_type"):
        load(config(ALPACA, {"type": "no_such_type"}))


def test_a_teacher_without_chat_template_needs_one_named(
    config: Any, load: Load, folder: Path
) -> None:
    teacher = {"base_model": str(folder / "teacher-without-template")}
    message = r"teacher-without-template\) has no chat template.*dskd\.teacher\.chat_template"
    with pytest.raises(ValueError, match=message):
        load(config(tiny.chat_rows(4), dskd={"teacher": teacher}))
    ours, _ = load(config(ALPACA, {"type": "alpaca"}, dskd={"teacher": teacher}))
    assert len(ours) == len(ALPACA)


@pytest.mark.parametrize("key", ["base_model", "tokenizer"])
def test_a_teacher_folder_that_vanished_is_named(
    key: str, config: Any, validated: Any, folder: Path, tmp_path: Path
) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets

    gone = tmp_path / "gone"
    gone.mkdir()
    teacher = {"base_model": str(folder / "teacher"), key: str(gone)}
    cfg = validated(config(tiny.chat_rows(4), dskd={"teacher": teacher}))
    gone.rmdir()
    with pytest.raises(ValueError, match=rf"dskd\.teacher\.{key}: there is no .*gone"):
        load_datasets(cfg=cfg, cli_args=TrainerCliArgs())


def test_templates_that_supervise_different_texts_stop_with_examples(
    config: Any, load: Load, folder: Path
) -> None:
    jinja = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | upper + eos_token }}"
        "{% endfor %}"
    )
    teacher = {"base_model": str(folder / "teacher"), "chat_template_jinja": jinja}
    with pytest.raises(ValueError, match=r"do not have the same supervised text") as error:
        load(config(tiny.chat_rows(4), dskd={"teacher": teacher}))
    assert "student: 'Because air" in str(error.value)
    assert "BECAUSE AIR" in str(error.value)
