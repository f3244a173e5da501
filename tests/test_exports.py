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

from tests import tiny
from tests.ranks import Result, run

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


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Result]:
    """A full and a LoRA run, then the adapter merged and asked something; no teacher by then."""
    common: dict[str, Any] = {
        "learning_rate": 1e-2,
        "dataloader_num_workers": 0,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    full = tiny.base_config(folder, output_dir=str(folder / "full"), **common)
    lora = tiny.base_config(folder, output_dir=str(folder / "lora"), **common, **LORA)
    path = folder / "lora.yaml"
    path.write_text(yaml.safe_dump(lora))
    trained = run(1, {"do": "train", "config": full}, {"do": "train", "config": lora})
    shutil.move(folder / "teacher", folder / "away")
    used = run(
        1,
        {"do": "command", "name": "merge_lora", "config": str(path)},
        {
            "do": "command",
            "name": "inference",
            "config": str(path),
            "arguments": {"lora_model_dir": str(folder / "lora")},
            "stdin": "Name a fruit.\n",
        },
    )
    return dict(zip(("full", "adapter", "merge_lora", "inference"), [*trained, *used], strict=True))


def test_full_adapter_and_merged_give_the_training_time_logits(
    folder: Path, exported: dict[str, Result]
):
    student, out = folder / "student", folder / "logits.pt"
    models = {
        "full": (str(folder / "full"), None),
        "adapter": (str(student), str(folder / "lora")),
        "merged": (str(folder / "lora" / "merged"), None),
        "start": (str(student), None),
    }
    subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(models), str(out)], check=True, cwd=folder
    )
    found = torch.load(out, weights_only=True)
    for name, source in (("full", "full"), ("adapter", "adapter"), ("merged", "adapter")):
        torch.testing.assert_close(found[name], exported[source]["logits"], msg=name)
        assert not torch.allclose(found[name], found["start"], atol=1e-2)


@pytest.mark.parametrize("kind", ["full", "lora", "lora/merged"])
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
