"""A memory plan can be made for every objective: each runs on tensors without numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_dskd.commands.cli import read_config
from axolotl_dskd.commands.inspect.card import Card, configured_for
from axolotl_dskd.commands.inspect.doctor import inspect_run
from axolotl_dskd.commands.inspect.report import MemoryReport
from axolotl_dskd.config import ObjectiveConfig
from tests.support import tiny

CARD = Card("a test card", 24 << 30, True)

#: Of the package, whatever other modules define; and one of a user's own.
NAMES = [
    *sorted(
        name
        for name, kind in ObjectiveConfig.known.items()
        if kind.__module__.startswith("axolotl_dskd.")
    ),
    "tests.support.toy_objective",
]
OF_ONE_VOCABULARY = {"token_kd"}


def plan(folder: Path, **dskd: Any) -> MemoryReport:
    """Of a step of wide rows, so that it is larger than the start of training."""
    sizes = {"pad_to_sequence_len": True, "micro_batch_size": 4}
    block = {"teacher": {"base_model": str(folder / "teacher")}, **dskd}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(tiny.base_config(folder, dskd=block, **sizes)))
    with configured_for(CARD):
        cfg, config = read_config(path)
    return inspect_run(str(path), cfg, config, card=CARD, rows=50).memory


@pytest.mark.parametrize(
    ("name", "one_vocabulary"),
    [
        pytest.param(name, same, id=f"{name}-{'one vocabulary' if same else 'two tokenizers'}")
        for name in NAMES
        for same in (False, True)
        if same or name not in OF_ONE_VOCABULARY
    ],
)
def test_every_objective_is_planned(tmp_path: Path, name: str, one_vocabulary: bool):
    tiny.save_pair(tmp_path, same_vocabulary=one_vocabulary)
    memory = plan(tmp_path, objective={"name": name})
    assert memory.fits
    assert memory.peak_phase == "alignment and loss"
    # At least one side's logits of some 200 supervised tokens, in float32.
    assert memory.at_peak["alignment and loss"] > 200 * 400 * 4
