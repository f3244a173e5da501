"""The real commands and what ends or changes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import tiny
from tests.support.ranks import launch, run

pytestmark = pytest.mark.slow


def axolotl(command: str, folder: Path, config: dict[str, Any]) -> subprocess.CompletedProcess:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", command, str(path)]
        + (["--launcher", "python"] if command in ("train", "evaluate") else []),
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        timeout=800,
    )


def test_preprocess_then_train_distils_and_the_metrics_fall(pair_folder: Path):
    config = tiny.base_config(
        pair_folder,
        max_steps=10,
        micro_batch_size=8,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=10,
        dataloader_num_workers=None,  # Axolotl's own default: collated by other processes
        dskd={
            "teacher": {"base_model": str(pair_folder / "teacher")},
            "objective": {"projector": {"learning_rate": 1e-2}},
        },
    )
    prepared = axolotl("preprocess", pair_folder, config)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    trained = axolotl("train", pair_folder, config)
    output = trained.stdout + trained.stderr
    assert trained.returncode == 0, output
    assert "Matching Teacher and Student Text" not in output  # prepared once, loaded now
    state = json.loads((pair_folder / "out" / "checkpoint-10" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs) == 10
    for name in ("loss", "dskd/ce", "dskd/projector_ce", "dskd/teacher_space"):
        assert logs[-1][name] < logs[0][name], name


def test_a_mistake_ends_the_command_with_its_message_before_weights_load(pair_folder: Path):
    (pair_folder / "student" / "model.safetensors").unlink()
    config = tiny.base_config(pair_folder, batch_flattening=True)
    [[found]] = launch(1, [{"do": "train", "config": config}])
    assert "use `sample_packing: true` instead" in found["error"]


def test_ligers_patches_do_not_get_in_the_way(pair_folder: Path):
    """Its patched forward returns no logits when labels are given; the loss needs none.

    Each in a process of its own, since the patches stay for good.
    """
    plugins = ["axolotl.integrations.liger.LigerPlugin", "axolotl_dskd.DSKDPlugin"]
    keys = {"plugins": plugins, "liger_fused_linear_cross_entropy": True}
    plain, liger = (
        run(1, {"do": "train", "config": tiny.base_config(pair_folder, **more)})[0]["losses"]
        for more in ({}, keys)
    )
    assert liger == pytest.approx(plain, rel=1e-5)
