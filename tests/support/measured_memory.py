"""A real training in a process of its own: its plan, and the most memory that it held.

On a CPU that is the growth of the resident set from before the student is loaded to the fullest
moment of training; on a GPU, PyTorch's own count.
`python -m tests.support.measured_memory CONFIG.yaml` prints both as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support import ranks

ROOT = Path(__file__).parents[2]
#: Of glibc's `mallopt`.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENAS = -3, -1, -8

ADAPTER = {"adapter": "lora", "lora_r": 16, "lora_alpha": 16, "lora_target_linear": True}

#: Large enough that tensors outweigh what the libraries allocate.
SIZES: dict[str, Any] = {"student": (16000, 512, 6), "teacher": (24000, 768, 6), "words": 150}

#: Trainings by what they train.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "qlora-checkpointed": {
        **ADAPTER,
        "adapter": "qlora",
        "load_in_4bit": True,
        "gradient_checkpointing": True,
    },
}


def large_run(
    folder: Path,
    *,
    student: tuple[int, int, int],
    teacher: tuple[int, int, int],
    words: int,
    **overrides: Any,
) -> Path:
    """A config in `folder` with random models large enough to measure, and rows of one length.

    Args:
        student, teacher: rows of the output head (more than the tokenizer has ids), hidden size,
            layers.
        words: of every answer.
    """
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support import tiny

    tokenizers = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    for name, size, tokenizer in zip(
        ("student", "teacher"), (student, teacher), tokenizers, strict=True
    ):
        rows, hidden, layers = size
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)  # see _resident
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    answer = " ".join(["water", "boils", "because", "molecules", "move"] * (words // 5))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    tiny.write_rows(folder / "rows.jsonl", [{"messages": turns}] * 32)
    settings = {"max_steps": 3, "micro_batch_size": 4, "sequence_len": 512, **overrides}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(tiny.base_config(folder, **settings)))
    return path


def measure(config: Path, *, gpu: bool = False) -> dict[str, Any]:
    """Plan and measurement of one config, in a new process: `plan`, `measured`, `at_peak`, …"""
    if not gpu:
        job = {"do": "plan_and_memory", "path": str(config)}
        (found,) = ranks.run(1, job, env={"CUDA_VISIBLE_DEVICES": ""})
        return found
    # CUDA is not to be forked.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.measured_memory", str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _resident() -> int:
    """Bytes of this process in memory, mapped files left out.

    Weights that are loaded in the dtype of their file stay in its mapping: models that are
    measured here are saved in another dtype.
    """
    with open("/proc/self/statm") as file:
        _, every, files, *_ = (int(pages) for pages in file.read().split())
    return (every - files) * os.sysconf("SC_PAGE_SIZE")


def _give_freed_blocks_back() -> None:
    """To the system, at once, so that the resident set is what is alive (glibc's `malloc.h`)."""
    libc = ctypes.CDLL(None)
    for option, value in ((_MMAP_THRESHOLD, 1 << 16), (_TRIM_THRESHOLD, 1 << 16), (_ARENAS, 1)):
        assert libc.mallopt(option, value)


class _Watch(threading.Thread):
    """The largest resident set, looked at every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.stop = 0, False

    def run(self) -> None:
        while not self.stop:
            self.largest = max(self.largest, _resident())
            time.sleep(0.002)


def plan_and_memory(path: str) -> dict[str, Any]:
    """Of a config, here: changes this process for as long as it lives."""
    import gc

    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    from axolotl_dskd.commands.inspect.card import find_card
    from axolotl_dskd.commands.inspect.command import inspect_run
    from axolotl_dskd.config import DSKDConfig
    from axolotl_dskd.training.trainer import DSKDTrainer

    _give_freed_blocks_back()
    cfg = load_cfg(path)
    config = DSKDConfig.of(cfg)
    assert config is not None
    card = find_card(None)
    memory = inspect_run(path, cfg, config, card=card, rows=1000).memory
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    gc.collect()
    watch = _Watch()
    compute_loss = DSKDTrainer.compute_loss

    def training_begins(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        """Loading maps whole weight files, which count as resident; training is what is planned."""
        DSKDTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
        gc.collect()
        watch.largest = 0
        return compute_loss(trainer, *args, **kwargs)

    DSKDTrainer.compute_loss = training_begins  # type: ignore[method-assign]
    before = _resident()
    watch.start()
    train(cfg=cfg, dataset_meta=meta)
    watch.stop = True
    measured = watch.largest - before
    if card.gpu:
        measured = torch.cuda.max_memory_allocated()
    return {
        "plan": memory.total,
        "measured": measured,
        "phase": memory.peak_phase,
        "at_peak": memory.at_peak,
        "phases": memory.phases,
        "batch": memory.batch,
    }


if __name__ == "__main__":
    print(json.dumps(plan_and_memory(sys.argv[1])))
