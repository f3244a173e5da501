"""`axolotl-dskd inspect`: the report of a configuration, before anything is trained."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from axolotl_dskd.commands.cli import main, read_config
from axolotl_dskd.commands.inspect.card import Card, configured_for, parse_memory
from axolotl_dskd.commands.inspect.command import inspect_run
from axolotl_dskd.commands.inspect.examples import divided, is_exact
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.shown import html_page
from axolotl_dskd.commands.pages import marked
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.byte_spans import tile
from axolotl_dskd.data.outcomes import CUT, KEPT
from axolotl_dskd.data.reconcile import SPANS, STATUS, TEACHER_SPANS, Reconcile
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.planning.plan import Plan
from axolotl_dskd.planning.skeleton import model_bytes, student_skeleton, teacher_skeleton
from tests.support import tiny, two_teachers

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "example_configs").glob("*.yaml"))
GIB = 1 << 30
A_CARD = Card("a test card", 24 * GIB, True)

Inspect = Callable[..., Report]


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return path


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    """The report of a config given as a dict."""

    def run(config: dict[str, Any], card: Card = A_CARD, rows: int = 50, **kwargs: Any) -> Report:
        path = write(tmp_path, config)
        with configured_for(card):
            cfg, dskd = read_config(path)
        return inspect_run(str(path), cfg, dskd, card=card, rows=rows, **kwargs)

    return run


# ---- every example ------------------------------------------------------------------------------

DOLLY = [
    {"instruction": question, "context": "" if i % 2 else "Think first.", "response": answer}
    for i, (question, answer) in enumerate(tiny.QUESTIONS * 4)
]
FINETOME = [
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for q, a in tiny.QUESTIONS * 4
]


def with_local_stand_ins(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with its models, data and folders replaced by small local ones."""
    config = copy.deepcopy(config)
    same = "same-vocab" in str(config["output_dir"]) or "Qwen2.5-0.5B" in config["base_model"]
    student, teacher = tiny.save_pair(folder, same_vocabulary=same)
    config["base_model"] = str(student)
    for keys in config["dskd"].get("teachers", {"": config["dskd"].get("teacher")}).values():
        keys["base_model"] = str(teacher)
    config.pop("special_tokens", None)  # names of the real tokenizers
    for number, dataset in enumerate(config["datasets"]):
        path = folder / f"data-{number}.jsonl"
        rows: Any = DOLLY if "dolly" in dataset["path"] else FINETOME
        if any(name in dataset["path"] for name in ("demo", "smoltalk")):
            rows = tiny.chat_rows(120)
        dataset |= {"path": str(tiny.write_rows(path, rows)), "ds_type": "json"}
    config["dataset_prepared_path"] = str(folder / "prepared")
    config["output_dir"] = str(folder / "out")
    return config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_config_is_inspected(path: Path, tmp_path: Path, inspect: Inspect):
    config = with_local_stand_ins(yaml.safe_load(path.read_text()), tmp_path)
    report = inspect(config, teacher=next(iter(config["dskd"].get("teachers", [None]))))
    assert report.memory.fits
    assert report.coverage.kept > 0
    assert report.coverage.sampled == sum(part.sampled for part in report.datasets)
    assert sum(report.coverage.outcomes.values()) == report.coverage.sampled
    same = any(
        one_vocabulary in report.objective
        for one_vocabulary in ("alignment positions", "token_kd", "each token's own exactly")
    )
    assert report.coverage.share == 1.0 if same else 0 < report.coverage.share < 1
    assert report.advice is None
    assert well_formed(html_page(report))
    assert json.loads(report.as_json())["memory"]["fits"]


# ---- what is counted ----------------------------------------------------------------------------


def test_rows_that_would_be_dropped_are_counted_by_reason(pair_folder: Path, inspect: Inspect):
    long = {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "word " * 400},
        ]
    }
    rows = [*tiny.chat_rows(10), long]
    tiny.write_rows(pair_folder / "rows.jsonl", rows)
    report = inspect(tiny.base_config(pair_folder))
    assert report.coverage.outcomes["student too long or empty"] == 1
    assert report.coverage.kept == 10


def test_a_sample_of_each_dataset_is_read_and_coverage_is_by_dataset(
    pair_folder: Path, inspect: Inspect
):
    config = tiny.base_config(pair_folder)
    more = tiny.write_rows(pair_folder / "more.jsonl", tiny.chat_rows(40))
    config["datasets"].append({"path": str(more), "ds_type": "json", "type": "chat_template"})
    report = inspect(config, rows=12)
    assert [(part.sampled, part.total) for part in report.datasets] == [(12, 16), (12, 40)]
    assert report.coverage.student_tokens == sum(p.student_tokens for p in report.datasets)


def test_a_dataset_of_which_nothing_is_kept_does_not_hide_the_others(
    pair_folder: Path, inspect: Inspect
):
    config = tiny.base_config(pair_folder)
    long = {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "word " * 400},
        ]
    }
    path = tiny.write_rows(pair_folder / "long.jsonl", [long] * 2)
    config["datasets"].append({"path": str(path), "ds_type": "json", "type": "chat_template"})
    report = inspect(config)
    assert [part.kept for part in report.datasets] == [16, 0]
    assert {example.dataset for example in report.examples} == {report.datasets[0].name}


def test_the_sides_are_described_as_they_are(pair_folder: Path, inspect: Inspect):
    report = inspect(tiny.base_config(pair_folder))
    assert (report.student.vocabulary, report.teacher.vocabulary) == (400, 600)
    ours, theirs = report.student.table, report.teacher.table
    assert "first in every row" not in ours["BOS"]
    assert theirs["BOS"] == "<s>, first in every row"
    assert (ours["a turn ends with"], theirs["a turn ends with"]) == ("<|end|>", "</s>")
    assert ours["a prompt reads"].startswith("<|user|>")
    assert "[user]" in theirs["a prompt reads"]


TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_groups_hold_every_token_once_and_exact_pairs_spell_the_same(text: str):
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    tables = token_bytes(student), token_bytes(teacher)
    reconcile = Reconcile(
        student_bytes=tables[0],
        teacher_bytes=tables[1],
        teacher_dummy_spaces=True,
        teacher_limit=10_000,
        truncate_teacher=False,
    )
    ids = [
        [t.eos_token_id, *t(text, add_special_tokens=False)["input_ids"], t.eos_token_id]
        for t in (student, teacher)
    ]
    raw = {"input_ids": ids[0], "labels": ids[0]}
    raw |= {"teacher_input_ids": ids[1], "teacher_labels": ids[1]}
    row = raw | reconcile(raw)
    assume(row.pop(STATUS) in (KEPT, CUT))
    groups = divided(row)
    for side, all_ids, column in zip((0, 1), ids, ("labels", "teacher_labels"), strict=True):
        held = [token for group in groups for token in group[side]]
        assert held == [all_ids[i] for i, y in enumerate(row[column]) if i and y != -100]
    for place, group in enumerate(groups):
        if is_exact(group):
            ours, theirs = (table[side[0]] for table, side in zip(tables, group, strict=True))
            # The first piece may have sentencepiece's space.
            assert ours == theirs or (place == 0 and b" " + ours == theirs) or not text


def test_tokens_of_one_vocabulary_meet_one_by_one():
    stored = {"labels": [-100, 5, -100, 7], "teacher_labels": [5, -100, -100, 5, 7]}
    row = stored | dict.fromkeys((SPANS, TEACHER_SPANS), tile([2, 3]).to_bytes())
    assert divided(row) == [([5], [5]), ([7], [7])]
    assert all(map(is_exact, divided(row)))


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora", "qlora", "8bit"])
def test_a_skeleton_counts_the_bytes_of_the_loaded_student(
    tmp_path: Path, validated: Callable[[dict[str, Any]], Any], kind: str
):
    from axolotl.loaders import ModelLoader, load_tokenizer

    tiny.save_pair(tmp_path, hidden_sizes=(64, 64))
    adapter = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    extra: dict[str, Any] = {
        "full": {},
        "lora": adapter,
        "qlora": {**adapter, "adapter": "qlora", "load_in_4bit": True},
        "8bit": {**adapter, "load_in_8bit": True},
    }[kind]
    cfg = validated(tiny.base_config(tmp_path, **extra))
    tokenizer = load_tokenizer(cfg)
    skeleton = student_skeleton(cfg, tokenizer)
    model, _ = ModelLoader(cfg, tokenizer).load()
    ours = model_bytes([*skeleton.parameters(), *skeleton.buffers()])
    theirs = sum(held_bytes(t) for t in {id(t): t for t in model.parameters()}.values())
    theirs += sum(b.numel() * b.element_size() for b in model.buffers())
    assert ours == pytest.approx(theirs, rel=1e-3)
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert {n: p.dtype for n, p in skeleton.named_parameters() if p.requires_grad} == trained


def held_bytes(parameter: torch.Tensor) -> int:
    """What a loaded parameter holds, its quantisation's constants included."""
    held = [parameter.data]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        held.append(state.absmax)
        if state.nested:
            held.append(state.state2.absmax)
    if getattr(parameter, "SCB", None) is not None:
        held.append(parameter.SCB)
    return sum(t.numel() * t.element_size() for t in held)


def test_the_plan_follows_what_the_configuration_says(pair_folder: Path, inspect: Inspect):
    def plan(**overrides: Any) -> Plan:
        # Wide rows, so that a step is larger than the start.
        sizes = {"pad_to_sequence_len": True, "micro_batch_size": 4, **overrides}
        return inspect(tiny.base_config(pair_folder, **sizes)).memory

    plain = plan()
    assert sum(plain.at_peak.values()) == plain.total == max(plain.phases.values())
    kept = plain.at_peak["student activations"]
    assert plan(gradient_checkpointing=True).at_peak["student activations"] < 0.6 * kept
    assert plan(micro_batch_size=8).at_peak["student activations"] == pytest.approx(
        2 * kept, rel=0.05
    )
    assert "optimizer states" not in plan(optimizer="sgd").at_peak
    assert plain.at_peak["optimizer states"] == pytest.approx(
        2 * plain.at_peak["student weights"], rel=1e-3
    )
    quantised = {"teacher": {"base_model": str(pair_folder / "teacher"), "load_in_4bit": True}}
    teacher = plan(dskd=quantised).at_peak
    assert teacher["teacher layers"] < 0.35 * plain.at_peak["teacher layers"]
    ends = "teacher embedding and head"
    assert teacher[ends] == plain.at_peak[ends]
    folder = str(pair_folder / "teacher")
    cached = plan(dskd={"teacher": {"base_model": folder, "cache": {"path": "cache"}}})
    assert "teacher layers" not in cached.at_peak
    one_space = plan(
        dskd={"teacher": {"base_model": folder}, "objective": {"teacher_space_weight": 0.0}}
    )
    loss = "alignment and loss"
    assert one_space.phases[loss] < plain.phases[loss]
    at_random = plan(
        dskd={"teacher": {"base_model": folder}, "objective": {"projector": {"init": "random"}}}
    )
    assert set(plain.phases) - set(at_random.phases) == {"start of training"}


def test_gradients_live_from_one_micro_step_to_the_next(pair_folder: Path, inspect: Inspect):
    one, two = (
        inspect(tiny.base_config(pair_folder, gradient_accumulation_steps=n)) for n in (1, 2)
    )
    gained = two.memory.phases["student forward"] - one.memory.phases["student forward"]
    assert gained >= one.memory.held["optimizer states"] / 2  # AdamW has two states a parameter


def test_where_it_does_not_fit_changes_are_named_until_it_does(pair_folder: Path, inspect: Inspect):
    config = tiny.base_config(pair_folder, micro_batch_size=8, pad_to_sequence_len=True)
    whole = inspect(config).memory
    fixed = sum(whole.at_peak[k] for k in ("CUDA context",))
    small = Card("a small card", fixed + int(0.4 * (whole.total - fixed)), True)
    memory = inspect(config, card=small).memory
    assert not memory.fits
    totals = [whole.total, *(step.total for step in memory.steps)]
    assert all(a > b for a, b in itertools.pairwise(totals))
    assert all(a - b == s.saves for a, b, s in zip(totals, totals[1:], memory.steps, strict=False))
    assert totals[-1] <= small.memory
    assert memory.steps[0].change == "gradient_checkpointing: true"


def test_a_large_model_is_planned_in_seconds_without_its_weights(tmp_path: Path):
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    teacher = DSKDConfig.model_validate(
        {"teacher": {"base_model": str(tmp_path), "load_in_4bit": True}}
    ).teacher
    model = teacher_skeleton(teacher, torch.device("cuda"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    # 6.53e9 weights of layers in NF4, embedding and head of 152,064 x 3,584 in bfloat16.
    assert model_bytes(model.parameters()) == pytest.approx(3.37e9 + 2.18e9, rel=0.005)


@pytest.mark.parametrize(
    ("text", "expected"), [("24GiB", 24 * GIB), ("24GB", 24 * 10**9), ("24576 MiB", 24 * GIB)]
)
def test_amounts_of_memory_are_read(text: str, expected: int):
    assert parse_memory(text) == expected


# ---- the page -----------------------------------------------------------------------------------


class _Checked(HTMLParser):
    VOID = ("meta", "br", "img", "hr", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "base"):
            self.bad.append(tag)
        self.bad += [f"{k}={v}" for k, v in attrs if k in ("src", "href") or k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.bad.append(f"</{tag}>")


def well_formed(page: str) -> bool:
    checked = _Checked()
    checked.feed(page)
    checked.close()
    return not checked.bad and not checked.open and "url(" not in page and "@import" not in page


def test_the_page_shows_hostile_and_invisible_text_as_text(pair_folder: Path, inspect: Inspect):
    answers = [
        '<script>alert(1)</script> & "quotes" <img src=x onerror=y>',
        "tab\tline\nnext\u200d\u202edrawkcab",
        "עברית and العربية, é and 😀👩‍👩‍👧",
    ]
    rows = [
        {"messages": [{"role": "user", "content": "<b>?</b>"}, {"role": "assistant", "content": a}]}
        for a in answers
    ]
    tiny.write_rows(pair_folder / "rows.jsonl", rows)
    page = html_page(inspect(tiny.base_config(pair_folder)))
    assert well_formed(page)
    assert "<script" not in page
    assert "⏎" in page
    assert "⇥" in page
    assert "\u202e" not in page


def test_what_has_no_ink_is_made_visible():
    assert re.sub("<.*?>", "", marked("a b\n\t\u200d\x00")) == "a·b⏎⇥ZWJU+0000"
    assert re.sub("<.*?>", "", marked("\u202edrawkcab")) == "U+202Edrawkcab"
    assert marked("<&>") == "&lt;&amp;&gt;"


# ---- the command --------------------------------------------------------------------------------


def run_command(*args: str) -> Any:
    return CliRunner().invoke(main, ["inspect", *args], terminal_width=100)


def test_the_command_writes_the_page_and_plain_text(pair_folder: Path):
    path = write(pair_folder, tiny.base_config(pair_folder))
    out = pair_folder / "report.json"
    done = run_command(str(path), "--gpu-memory", "24GiB", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "Fits:" in done.output
    page = pair_folder / "out" / "dskd-inspect.html"
    assert str(page) in done.output.replace("\n", "")
    assert well_formed(page.read_text())
    assert json.loads(out.read_text())["memory"]["card"] == 24 * GIB


def changed(config: dict[str, Any], what: str) -> dict[str, Any]:
    if what == "no dskd":
        return {k: v for k, v in config.items() if k not in ("dskd", "plugins")}
    if what == "no teacher":
        config["dskd"]["teacher"]["base_model"] = "./not/there"
    if what == "no student":
        config["base_model"] = "./not/there"
    if what == "no data":
        config["datasets"][0]["path"] = "./not/there.jsonl"
    if what == "kd_ratio 0":
        config["dskd"]["kd_ratio"] = 0
    if what == "bf16 without a GPU":
        config["bf16"] = True
    if what == "wrong type":
        config["datasets"][0]["type"] = "no_such_type"
    if what == "nothing supervised":
        config["datasets"][0]["roles_to_train"] = ["tool"]
    if what == "all too long":
        config["sequence_len"] = 8
    if what == "no plugin":
        del config["plugins"]
    rows = Path(config["datasets"][0]["path"])
    if what == "no rows":
        rows.write_text("")
    if what == "broken rows":
        rows.write_text("{no json")
    if what == "other columns":
        tiny.write_rows(rows, [{"prompt": "a", "completion": "b"}] * 4)
    if what == "tokenizer that loses text":
        lossy = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
        teacher = PreTrainedTokenizerFast(
            tokenizer_object=lossy, unk_token="[UNK]", eos_token="</s>"
        )
        teacher.save_pretrained(config["dskd"]["teacher"]["base_model"])
    return config


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        ("no dskd", (), "no `dskd:` block"),
        ("no teacher", (), "there is no ./not/there"),
        ("no student", (), "not/there"),
        ("no data", (), "not/there.jsonl"),
        ("kd_ratio 0", (), "uses no teacher"),
        ("wrong type", (), "no_such_type"),
        ("nothing supervised", (), "look at roles_to_train"),
        ("all too long", (), "raise sequence_len"),
        ("no plugin", (), "does not name the plugin"),
        ("no rows", (), "it has no rows"),
        ("broken rows", (), "rows.jsonl cannot be read"),
        ("other columns", (), "field_messages"),
        ("tokenizer that loses text", (), "do not determine the text"),
        ("bf16 without a GPU", (), "--gpu-memory 24GiB"),
        ("", ("--gpu-memory", "24"), "with its unit"),
        ("", ("--gpu-memory", "much"), "no amount of memory"),
    ],
)
def test_nonsense_is_refused_in_words(
    pair_folder: Path, what: str, options: tuple[str, ...], said: str
):
    path = write(pair_folder, changed(tiny.base_config(pair_folder), what))
    done = run_command(str(path), *options)
    assert done.exit_code == 1, done.output
    assert done.output.startswith("Error: ")
    assert said in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "said"), [("a: [b\n - c: :", "no readable YAML"), ("- a\n- b", "top level is list")]
)
def test_a_file_that_is_no_configuration_is_refused_in_words(tmp_path: Path, text: str, said: str):
    path = tmp_path / "config.yml"
    path.write_text(text)
    done = run_command(str(path))
    assert done.exit_code == 1
    assert said in done.output


def test_rows_that_would_stop_the_training_are_shown_with_both_texts(
    pair_folder: Path, inspect: Inspect
):
    teacher = PreTrainedTokenizerFast.from_pretrained(pair_folder / "teacher")
    backend = teacher.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    teacher.save_pretrained(pair_folder / "teacher")
    report = inspect(tiny.base_config(pair_folder))
    stop, normalising, *_ = report.remarks
    assert stop.startswith("Training will stop: ")
    assert "student: 'Because air" in stop
    assert "teacher: 'because air" in stop
    assert "Lowercase" in normalising
    assert well_formed(html_page(report))


def test_a_missing_file_is_a_usage_error(tmp_path: Path):
    assert run_command(str(tmp_path / "none.yml")).exit_code == 2


# ---- several teachers ---------------------------------------------------------------------------


def test_the_rows_are_one_teachers_and_the_memory_is_that_of_all(tmp_path: Path, inspect: Inspect):
    two_teachers.save(tmp_path)
    both = tiny.base_config(tmp_path, dskd=two_teachers.block(tmp_path), bf16=True)
    reports = {name: inspect(both, teacher=name) for name in two_teachers.FOLDERS}
    alone = {
        name: inspect({**both, "dskd": {"teacher": both["dskd"]["teachers"][name]}})
        for name in two_teachers.FOLDERS
    }
    for name, report in reports.items():
        assert report.coverage.sampled == report.coverage.kept == 4
        assert report.teacher.name == alone[name].teacher.name
        assert any("--teacher" in remark for remark in report.remarks)
        for part in ("teacher layers", "teacher embedding and head"):
            held = sum(other.memory.at_peak[part] for other in alone.values())
            assert report.memory.at_peak[part] == held
        assert report.memory.total > max(other.memory.total for other in alone.values())
    assert reports["chat"].coverage.share == 1.0 > reports["math"].coverage.share
    with pytest.raises(ValueError, match="say --teacher"):
        inspect(both)


def test_proposals_name_the_teachers_own_keys(tmp_path: Path, inspect: Inspect):
    two_teachers.save(tmp_path)
    config = tiny.base_config(tmp_path, dskd=two_teachers.block(tmp_path), bf16=True)
    report = inspect(config, card=Card("a tiny card", 1 << 20, True), teacher="chat")
    assert not report.memory.fits
    assert any("dskd.teachers.chat." in step.change for step in report.memory.steps)
