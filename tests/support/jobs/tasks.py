"""Trainings after which Axolotl's lm_eval plugin evaluates."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.utils.dict import DictDefault
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from tests.support.jobs.registry import job


@job
def train_for_tasks(config: dict[str, Any], folder: str, others: list[str]) -> dict[str, Any]:
    """`axolotl train` with both plugins, and lm-eval in this process as it would have been started,
    but that it is told of the tasks in a folder, which that plugin has no key for.

    Args:
        others: more models to evaluate, as lm-eval's `--model_args` name them.

    Returns:
        The started `commands`, and the `loglikelihoods` of all choices by each model.
    """
    from axolotl.integrations import lm_eval as plugin
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    commands: list[list[str]] = []

    def start(command: list[str], check: bool) -> None:
        assert check
        commands.append(command)

    noted = SimpleNamespace(run=start, CalledProcessError=subprocess.CalledProcessError)
    with patch.object(plugin, "subprocess", noted):
        do_train(load_cfg(DictDefault(config)), TrainerCliArgs())
    out = Path(config["output_dir"])
    if "adapter" in config:
        model = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        model.merge_and_unload().save_pretrained(out / "merged")
        AutoTokenizer.from_pretrained(out).save_pretrained(out / "merged")
    told = commands[0][commands[0].index("--model_args") + 1]

    def evaluate(model: str) -> list[float]:
        found = simple_evaluate(
            model="hf",
            model_args=model,
            tasks=config["lm_eval_tasks"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
        )
        samples = [s for task in found["samples"].values() for s in task]
        return [float(choice[0]) for sample in samples for choice in sample["filtered_resps"]]

    return {"commands": commands, "loglikelihoods": [evaluate(m) for m in (told, *others)]}
