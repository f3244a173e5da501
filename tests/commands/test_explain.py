"""`axolotl-dskd explain`: from real trainings with virtual attention to one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from axolotl_dskd.commands.cli import main
from axolotl_dskd.commands.explain.shown import Shown, read, specialisation
from tests.support import ranks, tiny
from tests.support.equivalence import ROWS, save_pair, training_config

STEPS = 6
ATTENTION = {"blocks": 4, "anneal": 0.5, "learning_rate": 0.05}


def config(folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    """Six steps, evaluated after every second one; attention is whole up to the third."""
    attention = {**ATTENTION, **keys.pop("attention", {})}
    rows = {"path": str(folder / "held-out.jsonl"), "ds_type": "json", "type": "chat_template"}
    return training_config(
        folder,
        {"virtual_attention": attention, **keys},
        name,
        {
            "max_steps": STEPS,
            "lr_scheduler": "constant",
            "eval_steps": 2,
            "test_datasets": [{**rows, "split": "train"}],
            "val_set_size": 0,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("explain"))
    tiny.write_rows(folder / "held-out.jsonl", tiny.chat_rows(ROWS)[3:6])
    configs = [
        config(folder, "taught"),
        config(folder, "alone", kd_ratio=0),
        config(folder, "unwatched"),
        config(folder, "other blocks", attention={"blocks": 8}),
    ]
    configs[-1]["max_steps"] = 1
    del configs[2]["test_datasets"], configs[2]["eval_steps"]
    found = ranks.run(1, *({"do": "train", "config": made} for made in configs))
    assert [len(result["losses"]) for result in found] == [STEPS, STEPS, STEPS, 1]
    # Evaluations do not change what is trained, although they look at another student.
    assert found[2]["losses"] == pytest.approx(found[0]["losses"], rel=1e-6)
    return folder


def explain(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["explain", *(a if a.startswith("--") else str(folder / a) for a in arguments)]
    )


@pytest.fixture(scope="module")
def shown(folder: Path) -> Shown:
    return read(folder / "taught")


@pytest.mark.slow
def test_a_training_records_attention_at_logs_and_margins_at_evaluations(shown: Shown):
    assert [m.step for m in shown.moments] == [1, 2, 3, 4, 5, 6]
    assert [m.step for m in shown.margins] == [0, 2, 4, 6]
    assert [m.strength for m in shown.moments] == pytest.approx([1, 1, 1, 0.5, 0, 0])
    K = len(shown.groups)
    for moment in shown.moments:
        np.testing.assert_allclose(moment.alpha.sum(-1), np.ones(K), atol=1e-4)
        mean = 1 - specialisation(moment.alpha).mean()
        assert moment.entropy == pytest.approx(mean, abs=1e-4)
    assert shown.moments[-1].entropy < 0.999
    for margins in shown.margins:
        assert margins.shares.shape == (K, 4)
        assert margins.tokens.sum() > 20
    assert (shown.whole.step, shown.whole_margins.step) == (3, 2)


@pytest.mark.slow
def test_the_page_shows_both_runs_and_loads_nothing(folder: Path):
    result = explain(folder, "taught", "--against", "alone")
    assert not result.exit_code, result.output
    assert "kd_ratio 0.5: after step 3 of 6" in result.output
    assert "no teacher (kd_ratio 0)" in result.output
    assert "One pair of runs is no evidence" in result.output
    page = (folder / "taught" / "dskd-explain.html").read_text()
    assert not re.findall(r"<script|<link|@import|url\(|<[^>]*=\s*[\"']?https?:", page)
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 3
    assert "&lt;|end|&gt;" not in page  # special tokens stand for no text
    assert "punctuation" in page


@pytest.mark.slow
def test_a_run_can_be_explained_alone_into_another_file(folder: Path):
    result = explain(folder, "alone", "--html", "alone.html")
    assert not result.exit_code, result.output
    assert "no evidence" not in result.output
    assert (folder / "alone.html").is_file()


@pytest.mark.slow
def test_runs_with_other_attention_are_refused_in_words(folder: Path):
    result = explain(folder, "taught", "--against", "other blocks")
    assert result.exit_code
    assert "blocks of their virtual attention are 4 and 8" in result.output


def test_a_run_without_attention_is_refused_in_words(tmp_path: Path):
    result = explain(tmp_path.parent, tmp_path.name)
    assert result.exit_code
    assert "no record of virtual attention" in result.output


def test_runs_with_one_kd_ratio_are_told_apart_by_their_names(tmp_path: Path):
    for name in ("classes-1", "classes-2", "again/classes-1"):
        (tmp_path / name).mkdir(parents=True)
        record(tmp_path / name, [(1, 0.9)])
    for other in ("classes-2", "again/classes-1"):
        result = explain(tmp_path, "classes-1", "--against", other)
        assert not result.exit_code, result.output
        one, two = re.findall(r"(\S+), kd_ratio 0\.5: after step", result.output)
        assert one != two
        assert f"with {one}, kd_ratio 0.5 is no different" in result.output


def record(folder: Path, moments: list[tuple[int, float]]) -> None:
    """What a training of three steps leaves: steps and entropies."""
    head = {
        "blocks": 2,
        "groups": "classes",
        "strength": 1.0,
        "names": ["a"],
        "sizes": [3],
        "examples": [[" x"]],
    }
    lines: list[dict[str, Any]] = [{"virtual_attention": head, "kd_ratio": 0.5}]
    for step, entropy in moments:
        attention = {"alpha": [[0.5, 0.5]], "entropy": entropy, "strength": 1.0}
        lines.append({"log": {}, "step": step, "max_steps": 3, "attention": attention})
    path = folder / "dskd-record.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_of_a_resumed_run_the_steps_that_count_are_shown(tmp_path: Path):
    record(tmp_path, [(1, 0.9), (2, 0.8), (3, 0.7), (2, 0.85), (3, 0.75)])
    found = read(tmp_path)
    assert [(m.step, m.entropy) for m in found.moments] == [(1, 0.9), (2, 0.85), (3, 0.75)]
    assert found.whole_margins is None
    result = explain(tmp_path.parent, tmp_path.name)
    page = (tmp_path / "dskd-explain.html").read_text()
    assert "Not measured" in page, result.output
    assert '<code><i class="sign">·</i>x</code>' in page
