"""`axolotl-dskd compare`: plans, killed and resumed comparisons, failures, the page."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner, Result
from rich.console import Console

from axolotl_dskd.commands.cli import main
from axolotl_dskd.commands.compare import launch, summary
from axolotl_dskd.commands.compare.outcome import Outcome, Point
from axolotl_dskd.commands.compare.plan import plan_runs, shown
from axolotl_dskd.commands.compare.reporter import Reporter
from axolotl_dskd.commands.compare.summary import compared, summarise
from axolotl_dskd.config import CompareConfig, DSKDConfig
from axolotl_dskd.evaluation.rows import Row, bits_per_byte
from axolotl_dskd.training.samples import answers_folder
from tests.support import tiny

#: A process that compares, whose trainings are quick: they write the record of a training.
DRIVER = """
import sys
from axolotl_dskd.commands.compare import launch
launch.train_command = lambda config, several: [
    sys.executable, "-m", "tests.support.recorded_training", str(config)
]
from axolotl_dskd.commands.cli import main
main()
"""
#: What no two comparisons have alike.
COSTS = {"seconds", "host_bytes", "gpu_bytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name in ("student", "teacher"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    tiny.write_rows(folder / "held-out.jsonl", tiny.chat_rows(4))
    config = tiny.base_config(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(folder: Path, out: str, *options: str) -> list[str]:
    named = ["--held-out", str(folder / "held-out.jsonl"), "--out", str(folder / out)]
    return ["compare", str(folder / "config.yaml"), *named, *options]


def started(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"} | environment,
    )


def finished(arguments: list[str]) -> tuple[int, str]:
    process = started(arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def without_costs(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: without_costs(v) for k, v in content.items() if k not in COSTS}
    return [without_costs(v) for v in content] if isinstance(content, list) else content


def results(folder: Path, out: str) -> Any:
    return without_costs(json.loads((folder / out / "results.json").read_text()))


TWO_BY_TWO = ("--runs", "sft,uld", "--seeds", "1,2")


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    """What an uninterrupted comparison printed."""
    code, output = finished(command(folder, "whole", *TWO_BY_TWO))
    assert code == 0, output
    return output


def test_a_comparison_killed_three_times_ends_with_the_same_results(folder: Path, whole: str):
    chance = random.Random(7)
    out, kept = folder / "killed", []
    for _ in range(3):
        before = set(out.glob("*/log.txt"))
        process = started(command(folder, "killed", *TWO_BY_TWO))
        while not set(out.glob("*/log.txt")) - before:
            time.sleep(0.02)
        time.sleep(1.8 * chance.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept.append({p: p.stat().st_mtime_ns for p in out.glob("*/result.json")})
    code, output = finished(command(folder, "killed", *TWO_BY_TWO))
    assert code == 0, output
    assert results(folder, "killed") == results(folder, "whole")
    assert 0 < len(kept[-1]) < 4, "no kill came between two runs; choose other moments"
    for path, when in kept[-1].items():
        assert path.stat().st_mtime_ns == when
    assert output.count("finished before") == len(kept[-1])


def test_a_second_comparison_does_not_touch_what_a_killed_one_left_running(folder: Path):
    """Its training outlives it."""
    process = started(command(folder, "orphan", *TWO_BY_TWO), RECORDED_TRAINING_PAUSE="30")
    record = folder / "orphan" / "sft-seed1" / "model" / "dskd-record.jsonl"
    while not record.exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    code, output = finished(command(folder, "orphan", *TWO_BY_TWO))
    assert code == 1
    assert "still at work" in output
    os.killpg(process.pid, signal.SIGKILL)


def test_a_terminated_comparison_leaves_no_training_behind(folder: Path):
    process = started(command(folder, "ended", *TWO_BY_TWO), RECORDED_TRAINING_PAUSE="30")
    record = folder / "ended" / "sft-seed1" / "model" / "dskd-record.jsonl"
    while not record.exists():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    with launch.only_one(folder / "ended"):  # its trainings would hold it
        pass


def test_changed_data_are_trained_on_again(folder: Path, whole: str):
    before = {p: p.stat().st_mtime_ns for p in (folder / "whole").glob("*/result.json")}
    rows = folder / "rows.jsonl"
    content = rows.read_text()
    rows.write_text(content + "\n")
    try:
        runs = plan_runs(
            yaml.safe_load((folder / "config.yaml").read_text()),
            CompareConfig(
                runs={"sft": {}, "uld": {}}, seeds=[1, 2], held_out=str(folder / "held-out.jsonl")
            ),
            folder / "whole",
        )
    finally:
        rows.write_text(content)
    digests = {json.loads(path.read_text())["digest"] for path in before}
    assert len(digests) == 4
    assert not digests & {run.digest for run in runs}


def test_a_result_of_other_data_is_kept_aside(folder: Path):
    once = ("--runs", "sft", "--seeds", "1")
    assert finished(command(folder, "changing", *once))[0] == 0
    rows = folder / "rows.jsonl"
    content = rows.read_text()
    rows.write_text(content + "\n")
    try:
        code, output = finished(command(folder, "changing", *once))
    finally:
        rows.write_text(content)
    assert code == 0, output
    assert "sft-seed1 is trained again" in output
    made = [json.loads(p.read_text()) for p in (folder / "changing").glob("sft-seed1*/result.json")]
    assert len({result["digest"] for result in made}) == 2


def test_a_failed_run_shows_its_log_and_the_others_go_on(folder: Path):
    code, output = finished(command(folder, "failing", "--runs", "sft,gold", "--seeds", "1"))
    assert code == 1
    assert "the weights of gold are damaged" in output
    assert str(folder / "failing" / "gold-seed1" / "log.txt") in output
    assert "1 of 2 runs failed: gold-seed1" in output
    assert [run["method"] for run in results(folder, "failing")["runs"]] == ["sft"]


def test_the_page_loads_nothing_and_escapes_what_it_says(folder: Path):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    evil = "<script>alert(1)<script>"
    config["compare"] = {"runs": {"sft": {}, evil: {"kd_ratio": 0.25}}}
    (folder / "evil.yaml").write_text(yaml.safe_dump(config))
    arguments = command(folder, "evil")
    code, output = finished(["compare", str(folder / "evil.yaml"), *arguments[2:]])
    assert code == 0, output
    page = (folder / "evil" / "compare.html").read_text()
    assert evil not in page
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
    assert not re.findall(r"<script|<link|<b>|@import|url\(|<[^>]*=\s*[\"']?https?:", page)
    assert "&lt;img src=http://x&gt;" in page
    assert "Say &lt;b&gt;hello&lt;/b&gt;." in page
    assert re.findall(r'src="([^"]{22})', page) == ["data:image/png;base64,"]


# ---- what is refused ---------------------------------------------------------------------------


def invoke(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["compare", str(folder / "config.yaml"), *options])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--runs", "sft,uldd", "--held-out", "0.5"), "no method 'uldd'. Did you mean uld?"),
        (("--runs", "sft,uld"), "no rows are held out"),
        (("--runs", "sft", "--held-out", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--held-out", "0.5"), "nothing to compare"),
        (("--runs", "sft", "--held-out", "0.5", "--seeds", "one"), "--seeds one: write whole"),
        (("--runs", "dskd,dual_space", "--held-out", "0.5"), "dskd and dual_space are one"),
        (("--runs", "../sft", "--held-out", "0.5"), "'../sft' is no name for a run"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(
    folder: Path, options: tuple[str, ...], words: str
):
    result = invoke(folder, *options)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"datasets": None}, "no `datasets:`"),
        ({"dskd": {"teacher": {"base_model": "x"}, "objective": None}}, "objective is None"),
        ({"dskd": {"teacher": {"base_model": "x"}, "objective": ["uld"]}}, "is ['uld']"),
    ],
)
def test_a_configuration_that_lacks_a_block_is_refused_in_words(
    folder: Path, changes: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(folder, tiny.base_config(folder) | changes)


def test_runs_differ_in_the_dskd_block_alone(folder: Path):
    base = yaml.safe_load((folder / "config.yaml").read_text())
    base["dskd"]["objective"] = {"name": "dual_space", "temperature": 3.0}
    base["dskd"]["virtual_attention"] = True
    changes = {"objective": {"projector": {"learning_rate": 1e-4}}}
    compare = CompareConfig(
        runs={"sft": {}, "dskd": {}, "slow": changes, "uld": {}}, seeds=[1, 2], held_out=0.5
    )
    runs = plan_runs(base, compare, folder / "plan")
    assert [run.name for run in runs[:4]] == ["sft-seed1", "dskd-seed1", "slow-seed1", "uld-seed1"]
    own = {"dskd", "output_dir"}
    for run in runs[:4]:
        same = run.config.keys() - own
        assert {k: run.config[k] for k in same} == {k: runs[0].config[k] for k in same}
    sft, dskd, slow, uld = (run.config["dskd"] for run in runs[:4])
    assert sft["kd_ratio"] == 0
    assert "virtual_attention" not in sft
    assert dskd["virtual_attention"] is uld["virtual_attention"] is True
    assert slow["objective"] == dskd["objective"] | {"projector": {"learning_rate": 1e-4}}
    assert uld["objective"] == {"name": "uld"}
    assert len({json.dumps(block["teacher"]) for block in (sft, dskd, slow, uld)}) == 1


# ---- numbers -----------------------------------------------------------------------------------


def outcome(method: str, seed: int, nats: dict[str, float]) -> Outcome:
    rows = {key: Row(value, 10, 4, 1.0) for key, value in nats.items()}
    bits = bits_per_byte(sum(nats.values()), 10 * len(nats))
    point = Point(1, 1.0, {"dskd/bits_per_byte": bits, "dskd/accuracy": 0.25}, rows, [])
    return Outcome(method, seed, "", "", 1, 1.0, 1, 0, [point], [])


def plan(folder: Path, base: dict[str, Any], **compare: Any) -> list[Any]:
    keys = {"runs": ["sft"], "held_out": str(folder / "held-out.jsonl"), **compare}
    return plan_runs(base, CompareConfig.model_validate(keys), folder / "planned")


def test_a_run_starts_and_ends_in_its_own_folder(folder: Path):
    base = tiny.base_config(folder) | {"hub_model_id": "me/mine", "resume_from_checkpoint": "there"}
    (run,) = plan(folder, base)
    assert not {"hub_model_id", "resume_from_checkpoint"} & run.config.keys()


@pytest.mark.parametrize("said", ["no", False, None])
def test_a_comparison_evaluates_where_its_configuration_does_not(folder: Path, said: Any):
    raw = yaml.safe_load((folder / "config.yaml").read_text()) | {"eval_strategy": said}
    (run,) = plan(folder, raw)
    assert run.config["eval_strategy"] == "epoch"
    (run,) = plan(folder, raw | {"eval_steps": 2})
    assert run.config.get("eval_strategy") is None
    assert run.config["eval_steps"] == 2


def test_runs_on_more_gpus_are_other_runs(folder: Path):
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    compare = CompareConfig(runs={"sft": {}}, held_out=str(folder / "held-out.jsonl"))
    one, two = (plan_runs(raw, compare, folder / "gpus", gpus)[0] for gpus in (1, 2))
    assert one.digest != two.digest


def test_more_runs_at_a_time_than_gpus_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    options = ("--runs", "sft", "--jobs", "2", "--gpus-per-run", "2")
    result = CliRunner().invoke(main, command(folder, "crowded", *options))
    assert result.exit_code == 1
    assert "3 GPUs have room for 1 runs of 2" in result.output


def test_runs_side_by_side_meet_at_ports_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else the second one finds the port taken, at which the first one's ranks have met."""
    says = [sys.executable, "-c", "import os; print(os.environ['MASTER_PORT'])"]
    monkeypatch.setattr(launch, "train_command", lambda config, several: says)
    runs = plan(folder, tiny.base_config(folder), seeds=[1, 2])
    reporter = Reporter(Console(file=io.StringIO()), [run.name for run in runs])
    with launch.only_one(folder / "ports") as lock:
        _, ended = launch.run_all(runs, ["", ""], reporter, lock)
    ports = {failure.log.read_text().strip() for failure in ended}
    assert len(ports) == 2
    assert "29500" not in ports
    monkeypatch.undo()
    _, more = " ".join(launch.train_command(Path("c.yaml"), several=True)).split(" -- ")
    told = launch_command_parser().parse_args([*more.split(), "train.py"])
    assert told.main_process_port == 0  # accelerate looks for a free one


def test_a_seed_that_is_named_twice_is_one_run(folder: Path):
    names = [run.name for run in plan(folder, tiny.base_config(folder), seeds=[1, 2, 1])]
    assert names == ["sft-seed1", "sft-seed2"]


def test_runs_without_a_teacher_are_compared_with_it_by_its_cache(folder: Path):
    def asked(base: dict[str, Any]) -> Any:
        (sft,) = plan(folder, base)
        return sft.config["dskd"]["evaluation"].get("teacher")

    assert asked(tiny.base_config(folder)) is True
    for teacher in (
        {"shard": "full"},  # which fills no cache
        {"server": {"url": "http://a", "gives": "logprobs"}},
    ):
        base = tiny.base_config(folder)
        base["dskd"]["objective"] = {"name": "chunk_likelihood", "merge": False, "debias": False}
        base["dskd"]["teacher"] |= teacher
        assert asked(base) is None
    base = tiny.base_config(folder)
    base["dskd"]["evaluation"] = {"teacher": False}
    assert asked(base) is False


def test_distances_from_the_teacher_are_means_over_seeds():
    def measured(seed: int, **metrics: float) -> Outcome:
        made = outcome("sft", seed, {"a": 1.0})
        for name, value in metrics.items():
            made.last.metrics[f"dskd/{name}"] = value
        return made

    both = [measured(1, teacher_kl=1.0, teacher_agreement=0.5)]
    (method,) = summarise([*both, measured(2, teacher_kl=2.0, teacher_agreement=0.75)])
    assert (method.teacher_kl, method.teacher_agreement) == (1.5, 0.625)
    (method,) = summarise([*both, measured(2)])
    assert (method.teacher_kl, method.teacher_agreement) == (None, None)


def test_an_on_policy_configuration_is_compared_with_fine_tuning(folder: Path):
    base = tiny.base_config(folder)
    base["dskd"]["samples"] = {"from": "student"}
    ours, sft = plan(folder, base, runs=["dskd", "sft"])
    assert ours.config["dskd"]["samples"] == {"from": "student"}
    assert "samples" not in sft.config["dskd"]


def test_what_the_teacher_writes_is_shared_by_runs_of_all_seeds(folder: Path):
    """It depends on `samples.seed` alone."""
    base = tiny.base_config(folder)
    base["dskd"]["samples"] = {"from": "teacher"}
    planned = [run.config for run in plan(folder, base, runs=["dskd", "uld"], seeds=[1, 2])]
    prepared = {config["dataset_prepared_path"] for config in planned}
    blocks = [DSKDConfig.model_validate(config["dskd"]) for config in planned]
    shared = {
        answers_folder(block, config["dataset_prepared_path"])
        for block, config in zip(blocks, planned, strict=True)
    }
    assert len(prepared) == 2
    assert len(shared) == 1
    own = DSKDConfig.model_validate(base["dskd"])
    assert {answers_folder(own, path) for path in prepared} == {Path(path) for path in prepared}


def test_a_teacher_that_fills_no_cache_is_given_none_and_devices_may_be_numbers(folder: Path):
    for teacher in ({"shard": "full"}, {"server": {"url": "http://a", "gives": "logprobs"}}):
        base = tiny.base_config(folder)
        base["dskd"]["teacher"] |= teacher
        block = plan(folder, base, runs=["dskd"])[0].config["dskd"]
        assert "cache" not in block["teacher"]
        DSKDConfig.model_validate(block)  # training takes it
    base = tiny.base_config(folder)
    base["dskd"]["teacher"] |= {"device_map": "auto", "max_memory": {0: "10GiB", "cpu": "9GiB"}}
    plan(folder, base, runs=["dskd"])


def test_other_rows_under_data_files_are_another_comparison(folder: Path):
    rows = folder / "inside.jsonl"
    base = tiny.base_config(folder)
    base["datasets"][0] |= {"path": "json", "data_files": [str(rows)]}
    digests = set()
    for count in (3, 4):
        tiny.write_rows(rows, tiny.chat_rows(count))
        digests.add(plan(folder, base)[0].digest)
    assert len(digests) == 2


def test_what_is_handed_on_shows_no_secret():
    config = {"comet_api_key": "sesame", "special_tokens": {"pad_token": "<pad>"}, "x": [{"a": 1}]}
    assert shown(config) == config | {"comet_api_key": "(not shown)"}


def test_a_difference_in_every_row_is_one_and_noise_is_none():
    draws = np.random.default_rng(3)
    base = dict(zip(map(str, range(200)), draws.uniform(5, 15, 200).tolist(), strict=True))
    lower = {key: 0.95 * value for key, value in base.items()}
    noisy = {key: value + float(draws.normal(0, 3)) for key, value in base.items()}
    first = [outcome("sft", seed, base) for seed in (1, 2)]
    better = compared([outcome("better", seed, lower) for seed in (1, 2)], first, "last")
    same = compared([outcome("noisy", seed, noisy) for seed in (1, 2)], first, "last")
    assert better is not None
    assert better.relative == pytest.approx(-0.05)
    assert better.low == pytest.approx(-0.05)
    assert (better.verdict, better.wins, better.seeds) == ("fewer", 2, 2)
    assert same is not None
    assert same.verdict == "no difference"
    assert same.low < 0 < same.high


def test_many_held_out_rows_take_no_more_memory_and_give_the_same_interval(
    monkeypatch: pytest.MonkeyPatch,
):
    draws = np.random.default_rng(4)

    def two(rows: int) -> list[list[Outcome]]:
        values = draws.uniform(5, 15, (2, rows))
        made = [dict(zip(map(str, range(rows)), row.tolist(), strict=True)) for row in values]
        return [[outcome("a", 1, nats)] for nats in made]

    few, many = two(50), two(20_000)
    whole = compared(*few, "last")
    monkeypatch.setattr(summary, "_DRAWN_AT_ONCE", 120)
    assert compared(*few, "last") == whole
    monkeypatch.undo()
    tracemalloc.start()
    compared(*many, "last")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 200 << 20  # all at once they would take 900 MiB


def test_the_best_evaluation_may_be_the_first_one_after_a_step():
    """`eval_on_start: false` leaves out the one before any."""

    def best(*points: tuple[int, float]) -> int:
        found = [Point(s, s / 2, {"dskd/bits_per_byte": bits}, {}, []) for s, bits in points]
        return Outcome("sft", 1, "", "", 1, 1.0, 1, 0, found, []).best.step

    assert best((2, 1.0), (4, 2.0)) == 2
    assert best((0, 1.0), (2, 3.0), (4, 2.0)) == 4
    assert best((0, 1.0)) == 0


def test_methods_without_a_common_seed_are_not_compared():
    methods = summarise([outcome("sft", 1, {"a": 1.0}), outcome("uld", 2, {"a": 1.0})])
    assert methods[1].against == {}
