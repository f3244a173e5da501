"""`axolotl-dskd cache`, in this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from axolotl_dskd.cache import read_json, write_json
from axolotl_dskd.commands.cli import main
from tests.support import tiny, two_teachers
from tests.support.runs import losses

Train = Callable[[dict[str, Any]], Any]


def config(folder: Path, **cache: Any) -> dict[str, Any]:
    block = {"path": str(folder / "cache"), "dtype": "float32", **cache}
    teacher = {"base_model": str(folder / "teacher"), "cache": block}
    return tiny.base_config(folder, dskd={"teacher": teacher}, val_set_size=0.25)


def command(folder: Path, content: dict[str, Any], *options: str, name: str = "write") -> Result:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return CliRunner().invoke(main, ["cache", name, str(path), *options])


def test_written_ahead_it_gives_the_live_runs_losses_and_no_teacher_is_loaded(
    pair_folder: Path,
    train: Train,
    loads: list[int],
):
    cached = config(pair_folder)
    plain = {**cached, "dskd": {"teacher": {"base_model": str(pair_folder / "teacher")}}}
    expected = losses(train(plain)[1])
    result = command(pair_folder, cached)
    assert result.exit_code == 0, result.output
    assert "16 samples cached" in result.output
    assert "Complete" in result.output
    assert "base_model" not in result.stdout  # what Axolotl logs is no part of the answer
    assert "Complete" in result.stdout
    errors = dict(re.findall(r"│ (int\d) .*│ +([\d.e-]+) │ +[\d.e-]+ │", result.output))
    assert 0 < float(errors["int8"]) < float(errors["int4"]) < 0.1
    assert len(loads) == 1
    assert losses(train(cached)[1]) == pytest.approx(expected, rel=1e-6)
    again = command(pair_folder, cached)
    assert "16 of 16 samples cached" in again.output
    assert len(loads) == 1


def test_of_a_teacher_for_evaluations_alone_the_held_out_rows_are_cached(
    pair_folder: Path, train: Train, loads: list[int]
):
    tuned = config(pair_folder)
    tuned["dskd"] |= {"kd_ratio": 0.0, "evaluation": {"teacher": True}}
    result = command(pair_folder, tuned)
    assert result.exit_code == 0, result.output
    assert "0 of 4 samples cached" in result.output
    assert len(loads) == 1
    train(tuned | {"eval_strategy": "epoch"})
    assert len(loads) == 1
    without = command(pair_folder, {**tuned, "val_set_size": 0})
    assert without.exit_code == 1
    assert "nothing is held out" in without.output
    tuned["dskd"]["evaluation"] = {}
    assert "nothing to cache" in command(pair_folder, tuned).output


@pytest.mark.slow
def test_rows_that_the_teacher_will_answer_are_neither_written_ahead_nor_pruned(
    pair_folder: Path, train: Train
):
    """Training asks about its answers, not about the data's own."""
    answered = config(pair_folder)
    answered["dskd"]["samples"] = {"from": "teacher", "max_new_tokens": 8}
    written = command(pair_folder, answered)
    assert written.exit_code == 0, written.output
    assert "0 of 4 samples cached" in written.stdout
    assert "loads the teacher's layers to answer the rows" in " ".join(written.stdout.split())
    nothing = command(pair_folder, {**answered, "val_set_size": 0})
    assert nothing.exit_code == 1
    assert "nothing to cache ahead" in nothing.output
    train(answered)
    shards = set(pair_folder.glob("cache/*/states-*"))
    assert len(shards) > 1
    pruned = command(pair_folder, answered, "--yes", name="prune")
    assert "Nothing to remove" in pruned.stdout
    assert set(pair_folder.glob("cache/*/states-*")) == shards
    assert "known then" in " ".join(command(pair_folder, answered, name="info").stdout.split())


@pytest.mark.slow
def test_a_teacher_that_no_row_asks_has_nothing_to_cache(tmp_path: Path):
    two_teachers.save(tmp_path)
    block = two_teachers.block(tmp_path)
    for teacher in block["teachers"].values():
        teacher["cache"] = {"path": str(tmp_path / "cache"), "dtype": "float32"}
    rows = [row for row in two_teachers.rows(8) if row[two_teachers.FIELD] == "chat"]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    written = command(tmp_path, tiny.base_config(tmp_path, dskd=block))
    assert written.exit_code == 0, written.output
    assert "No row asks this teacher" in written.stdout
    assert "0 of 4 samples cached" in written.stdout


@pytest.mark.slow
def test_parts_make_up_the_whole(pair_folder: Path):
    one = command(pair_folder, config(pair_folder), "--part", "1/2")
    assert "samples are other parts'" in one.output
    two = command(pair_folder, config(pair_folder), "--part", "2/2")
    assert "16 of 16 samples cached" not in two.output
    assert "Complete" in two.output
    assert command(pair_folder, config(pair_folder), "--part", "3/2").exit_code == 2


def test_verify_names_the_damaged_files_and_the_next_run_computes_what_they_lost(
    pair_folder: Path,
):
    cached = config(pair_folder)
    command(pair_folder, cached)
    assert "No damage" in command(pair_folder, cached, name="verify").output
    shard = next(pair_folder.glob("cache/*/states-*"))
    head = next(pair_folder.glob("cache/*/head.safetensors"))
    for path in (shard, head):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    found = command(pair_folder, cached, name="verify")
    assert found.exit_code == 1
    assert f"{shard} is damaged: 1 of 16 samples are lost" in found.output
    assert f"{head} is damaged" in found.output
    assert "2 damaged files" in found.output
    assert "No damage" in command(pair_folder, cached, name="verify").output
    repaired = command(pair_folder, cached)
    assert "15 of 16 samples cached" in repaired.output
    assert "Complete" in repaired.output


@pytest.mark.slow
def test_info_shows_every_teacher_and_prune_keeps_only_what_the_config_uses(pair_folder: Path):
    command(pair_folder, config(pair_folder, dtype="int4"))
    cached = config(pair_folder)
    command(pair_folder, cached)
    shown = command(pair_folder, cached, name="info").output
    assert "int4" in shown
    assert "16 of 16 samples cached" in shown
    here = next(pair_folder.glob("cache/*-float32"))
    note = read_json(here / "teacher.json")
    assert note is not None
    note["content"]["dtype"] = "bfloat16"  # as dtype auto is on a GPU
    elsewhere = pair_folder / "cache" / "elsewhere-float32"
    elsewhere.mkdir()
    write_json(elsewhere / "teacher.json", note)
    fewer = {**cached, "datasets": [{**cached["datasets"][0], "split": "train[:8]"}]}
    asked = command(pair_folder, fewer, name="prune")  # no answer: nothing is removed
    assert asked.exit_code == 1
    assert "another teacher or storage" in asked.output
    assert len(list(pair_folder.glob("cache/*/"))) == 3
    pruned = command(pair_folder, fewer, "--yes", name="prune")
    assert pruned.exit_code == 0, pruned.output
    assert "8 of 16 samples that this configuration does not use" in pruned.output
    assert {p.name for p in pair_folder.glob("cache/*/")} == {here.name, elsewhere.name}
    assert "8 of 8 samples cached" in command(pair_folder, fewer).output
    assert "Nothing to remove" in command(pair_folder, fewer, name="prune").output


@pytest.mark.slow
def test_too_little_room_and_missing_blocks_are_refused_before_the_teacher_runs(
    pair_folder: Path,
):
    small = command(pair_folder, config(pair_folder, max_size="200kB"))
    assert small.exit_code == 1
    assert "of max_size 200.0 kB already" in small.output
    plain = tiny.base_config(pair_folder)
    assert "no `cache:` in dskd.teacher" in command(pair_folder, plain).output
    none = config(pair_folder)
    none["dskd"]["kd_ratio"] = 0.0
    assert "nothing to cache" in command(pair_folder, none).output
    wrong = config(pair_folder, max_size="many")
    assert "'many' is no size" in command(pair_folder, wrong).output
    nowhere = config(pair_folder, path="/proc/nothing")
    assert "nothing can be written to /proc/nothing" in command(pair_folder, nowhere).output
    nothing = command(pair_folder, config(pair_folder, dtype="int4"), name="verify")
    assert nothing.exit_code == 1
    assert "nothing is cached of this teacher (float32) yet" in nothing.output


@pytest.mark.parametrize(
    ("name", "options"),
    [("info", ("--part", "1/2")), ("verify", ("--yes",)), ("write", ("--yes",))],
)
def test_options_of_another_subcommand_are_refused(
    tmp_path: Path, name: str, options: tuple[str, ...]
):
    result = command(tmp_path, {}, *options, name=name)
    assert result.exit_code == 2
    assert "No such option" in result.output


@pytest.mark.parametrize(
    ("flags", "wanted"), [((), "write"), (("--info",), "info"), (("--part", "1/2"), "write")]
)
def test_a_config_in_place_of_a_subcommand_is_answered_with_the_command_to_use(
    flags: tuple[str, ...], wanted: str
):
    result = CliRunner().invoke(main, ["cache", "my.yaml", *flags])
    assert result.exit_code == 2
    assert f"`axolotl-dskd cache {wanted} my.yaml`" in result.output
    unknown = CliRunner().invoke(main, ["cache", "wirte", "my.yaml"])
    assert "No such command 'wirte'" in unknown.output


@pytest.mark.parametrize(
    "text",
    ["", "- 1\n", "a: [1,\n b: {", "plugins: [axolotl_dskd.DSKDPlugin]\ndskd: true\n"],
)
def test_a_file_that_holds_no_configuration_is_refused_in_words(tmp_path: Path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    result = CliRunner().invoke(main, ["cache", "write", str(path)])
    assert result.exit_code == 1
    assert f"Error: {path} " in result.output


@pytest.mark.slow
def test_the_caches_of_two_teachers_share_a_folder_and_prune_leaves_both(
    tmp_path: Path, train: Train, loads: list[int]
):
    two_teachers.save(tmp_path)
    block = two_teachers.block(tmp_path)
    for teacher in block["teachers"].values():
        teacher["cache"] = {"path": str(tmp_path / "cache"), "dtype": "float32"}
    config = tiny.base_config(tmp_path, dskd=block)
    written = command(tmp_path, config)
    assert written.exit_code == 0, written.output
    assert written.stdout.count("0 of 4 samples cached") == 2
    assert len(loads) == 2
    assert command(tmp_path, config, name="info").stdout.count("4 of 4 samples cached") == 2
    assert command(tmp_path, config, "--yes", name="prune").stdout.count("Nothing to remove") == 2
    assert "No damage" in command(tmp_path, config, name="verify").stdout
    live = train(tiny.base_config(tmp_path, dskd=two_teachers.block(tmp_path)))[1]
    assert losses(train(config)[1]) == pytest.approx(losses(live), rel=1e-6)
    assert len(loads) == 2
