"""What a run leaves behind is a plain model or adapter, used without this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.support import tiny
from tests.support.ranks import Result, run

pytestmark = pytest.mark.slow

LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
}

#: Run in a process of its own, in which neither this package nor Axolotl can be imported.
LOAD = """
import json, sys
sys.modules["axolotl_dskd"] = sys.modules["axolotl"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ids = torch.arange(3, 19).unsqueeze(0)
found = {}
for name, (base, adapter) in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids).logits
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny.save_pair(folder)
    return folder


SAVED_HEAD = LORA | {"lora_modules_to_save": ["lm_head"]}
LORA_HEAD = LORA | {"lora_target_modules": [*LORA["lora_target_modules"], "lm_head"]}

#: Name of the run: number of ranks, and what it trains.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (1, {}),
    "lora": (1, LORA),
    "full on two": (2, {}),
    "saved head on two": (2, SAVED_HEAD),
    "lora head on two": (2, LORA_HEAD),
}
ADAPTERS = [name for name, (_, kind) in RUNS.items() if kind]
STEPS = 4


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Result]:
    """The runs, then their adapters merged and one asked something; no teacher by then."""
    paths, jobs = {}, {}
    for name, (ranks, kind) in RUNS.items():
        config = tiny.base_config(
            folder,
            output_dir=str(folder / name),
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=STEPS,
            micro_batch_size=4 // ranks,
            **kind,
        )
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(config))
        jobs[name] = {"do": "train", "config": config}
    results: dict[str, Result] = {}
    for ranks in (1, 2):
        names = [name for name in RUNS if RUNS[name][0] == ranks]
        results |= zip(names, run(ranks, *(jobs[name] for name in names)), strict=True)
    shutil.move(folder / "teacher", folder / "away")
    question = {
        "do": "command",
        "name": "inference",
        "config": str(paths["saved head on two"]),
        "arguments": {"lora_model_dir": str(folder / "saved head on two")},
        "stdin": "Name a fruit.\n",
    }
    merging = [
        {"do": "command", "name": "merge_lora", "config": str(paths[name])} for name in ADAPTERS
    ]
    *_, results["inference"] = run(1, *merging, question)
    return results


def test_full_adapter_and_merged_give_the_training_time_logits(
    folder: Path, exported: dict[str, Result]
):
    """And so does the last checkpoint, from which the projectors were removed."""
    student, out = folder / "student", folder / "logits.pt"
    models: dict[str, tuple[str, str | None]] = {"start": (str(student), None)}
    source = {}
    for name in RUNS:
        checkpoint = folder / name / f"checkpoint-{STEPS}"
        shutil.rmtree(checkpoint / "dskd")
        for path in (folder / name, checkpoint):
            key = f"{name}: {path.name}"
            models[key] = (str(student), str(path)) if name in ADAPTERS else (str(path), None)
            source[key] = name
        if name in ADAPTERS:
            models[f"{name}: merged"] = (str(folder / name / "merged"), None)
            source[f"{name}: merged"] = name
    subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(models), str(out)], check=True, cwd=folder
    )
    found = torch.load(out, weights_only=True)
    assert len(source) == 2 * len(RUNS) + len(ADAPTERS)
    for key, name in source.items():
        torch.testing.assert_close(found[key], exported[name]["logits"], msg=key)
        assert not torch.allclose(found[key], found["start"], atol=1e-2)


@pytest.mark.parametrize("kind", [*RUNS, *(f"{name}/merged" for name in ADAPTERS)])
def test_no_file_and_no_tensor_of_ours_is_exported(
    folder: Path, exported: dict[str, Result], kind: str
):
    files = [p for p in (folder / kind).iterdir() if p.is_file()]
    weights = [p for p in files if p.suffix == ".safetensors"]
    assert weights
    assert not [p.name for p in (folder / kind).iterdir() if "dskd" in p.name]
    for path in weights:
        with safe_open(path, "pt") as tensors:
            keys = list(tensors.keys())
        assert not [k for k in keys for ours in ("t2s", "s2t", "query", "project") if ours in k]
    for path in files:
        if path.suffix == ".json":
            assert "dskd" not in path.read_text(), path


def test_the_adapter_answers_through_axolotl_inference(exported: dict[str, Result]):
    assert "<|assistant|>" in exported["inference"]["output"]
