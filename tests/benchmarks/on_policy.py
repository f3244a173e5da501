"""Beside `on_policy.yaml`: the fine-tuned student that all runs begin from, and what each run's
student is to its teacher on texts of its own.

    python tests/benchmarks/on_policy.py student
    python tests/benchmarks/on_policy.py reverse-kl

`reverse-kl` lets every trained student answer the held-out prompts, drawing at temperature 1 with
fixed seeds, and prints the mean of (log q(answer) - log p(answer)) / bytes in bits: an estimate of
the reverse KL between student q and teacher p on the student's own text, by bytes, so that it needs
no common tokenizer. Each model reads its own chat template and its own tokens of the same text;
ends of turns are left out, and so are answers that are empty or no text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

RUNS = Path("outputs/demo/on-policy/compare")
HELD_OUT = Path("example_configs/demo/heldout.jsonl")
NEW_TOKENS = 64


class Model:
    """A model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Up to where an answer begins."""
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def answer(self, messages: list[dict[str, str]], seed: int) -> str:
        """What it writes, drawn at temperature 1; without its end of turn."""
        torch.manual_seed(seed)
        ids = torch.tensor([self.prompt(messages)])
        out = self.model.generate(
            ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS,
            pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def log_likelihood(self, messages: list[dict[str, str]], answer: str) -> float:
        """Of an answer's text, in nats."""
        prompt = self.prompt(messages)
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        return float(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())


def reverse_kl(student: Model, teacher: Model, rows: list[list[dict[str, str]]]) -> float:
    """Bits per byte, see the module."""
    nats = size = 0.0
    for seed, messages in enumerate(rows):
        text = student.answer(messages, seed)
        if not text.strip() or "\ufffd" in text:
            continue
        both = (model.log_likelihood(messages, text) for model in (student, teacher))
        nats += next(both) - next(both)
        size += len(text.encode())
    return nats / size / math.log(2)


def make_student() -> None:
    """Two epochs of plain fine-tuning on the demo's first rows."""
    from axolotl.cli.train import do_cli

    config: dict[str, Any] = yaml.safe_load(Path("example_configs/quickstart-cpu.yaml").read_text())
    config["dskd"]["kd_ratio"] = 0
    config |= {"num_epochs": 2, "seed": 1, "save_strategy": "no", "output_dir": "outputs/demo/sft"}
    config["dataset_prepared_path"] = "outputs/demo/sft-prepared"
    path = Path("outputs/demo/sft.yaml")
    path.write_text(yaml.safe_dump(config))
    do_cli(config=str(path))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("student", "reverse-kl"))
    if parser.parse_args().what == "student":
        return make_student()
    torch.set_num_threads(1)
    rows = [json.loads(line)["messages"][:-1] for line in HELD_OUT.read_text().splitlines()]
    teacher = Model(Path("outputs/demo/teacher"))
    start = reverse_kl(Model(Path("outputs/demo/sft")), teacher, rows)
    print(f"student that all begin from: {start:.4f}", flush=True)
    found: dict[str, list[float]] = defaultdict(list)
    for run in sorted(RUNS.glob("*-seed*/model/model.safetensors")):
        name = run.parent.parent.name
        found[name.rpartition("-seed")[0]].append(reverse_kl(Model(run.parent), teacher, rows))
        print(f"{name}: {found[name.rpartition('-seed')[0]][-1]:.4f}", flush=True)
    for method, values in found.items():
        print(f"{method}: mean {sum(values) / len(values):.4f} of {len(values)}")


if __name__ == "__main__":
    main()
