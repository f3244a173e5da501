"""`axolotl-dskd quantization`: its numbers are those of the models' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from axolotl_dskd.commands.cli import main
from axolotl_dskd.commands.quantization import compare_forms
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.teacher import load_teacher
from tests.support import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration with a quantised teacher, and its pair on disk."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny.save_pair(folder, hidden_sizes=(32, 128))
    teacher = {"base_model": str(folder / "teacher"), "load_in_4bit": True, "dtype": "float32"}
    return tiny.base_config(folder, dskd={"teacher": teacher})


def run_command(path: Path, config: dict[str, Any], *options: str) -> Result:
    path.write_text(yaml.safe_dump(config))
    return CliRunner().invoke(main, ["quantization", str(path), *options])


def test_it_is_the_divergence_of_the_two_forms_own_logits(config: dict[str, Any]):
    teacher = DSKDConfig.model_validate(config["dskd"]).teacher
    ids = tiny.sentencepiece_tokenizer()("Wood, ice and a small paper boat.")["input_ids"]
    rows = [{"teacher_input_ids": ids, "teacher_labels": [-100, *ids[1:]]}] * 4
    found = compare_forms(teacher, rows, 3, 600, torch.device("cpu"))
    assert found.rows == 3
    assert found.tokens == 3 * (len(ids) - 1)
    plain = teacher.model_copy(update={"load_in_4bit": False})
    log_p, log_q = (
        load_teacher(t, torch.device("cpu"))(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for t in (plain, teacher)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.kl > 1e-4
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
    assert found.agreement == pytest.approx(float(agree))


def test_the_command_measures_so_many_of_the_users_rows(config: dict[str, Any], tmp_path: Path):
    done = run_command(tmp_path / "config.yml", config, "--rows", "2")
    assert done.exit_code == 0, done.output
    assert "of 2 rows, the quantised teacher" in done.output


def test_an_unquantised_teacher_is_refused_in_words(config: dict[str, Any], tmp_path: Path):
    teacher = {k: v for k, v in config["dskd"]["teacher"].items() if k != "load_in_4bit"}
    done = run_command(tmp_path / "config.yml", {**config, "dskd": {"teacher": teacher}})
    assert done.exit_code == 1
    assert "neither load_in_4bit nor load_in_8bit" in done.output
    assert "Traceback" not in done.output
