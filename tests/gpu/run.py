"""What CPUs cannot run: `axolotl train` on CUDA devices, in every way of sharding and precision.

    python tests/gpu/run.py                # all that this machine's GPUs allow
    python tests/gpu/run.py zero3 float16  # some

On two GPUs each way of sharding is compared with one GPU, in float32: the losses of ten steps, and
those of a run that is resumed after five. On one GPU each precision is compared with float32 there.
Prints one line a run; ends with 1 if a difference is above what the precision explains.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.support import tiny
from tests.support.sharding import SHARDED, zero

STEPS = 10
#: name -> (configuration, largest difference of a loss from the float32 run on one GPU).
SHARDINGS: dict[str, tuple[dict[str, Any], float]] = {
    "ddp": ({}, 1e-4),
    "fsdp2": (SHARDED, 1e-4),
    "zero1": (zero(1), 1e-4),
    "zero2": (zero(2), 1e-4),
    "zero3": (zero(3), 1e-4),
    "teacher": ({"dskd": {"teacher": {"shard": "full"}}}, 1e-4),
}
QUANTISED = {"adapter": "qlora", "load_in_4bit": True}
LORA = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_linear": True}
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "bfloat16": ({"bf16": True}, 0.1),
    "float16": ({"fp16": True}, 0.1),
}
#: Compared with themselves on one GPU: (both runs' configuration, that of two GPUs, difference).
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "qlora": ({**QUANTISED, **LORA, "bf16": True}, {}, 0.05),
    "qlora-fsdp2": ({**QUANTISED, **LORA, "bf16": True}, SHARDED, 0.05),
    "qlora-zero2": ({**QUANTISED, **LORA, "bf16": True}, zero(2), 0.05),
    "bfloat16-zero2": (
        {"bf16": True},
        {"deepspeed": zero(2)["deepspeed"] | {"bf16": {"enabled": True}}},
        0.05,
    ),
    "bfloat16-zero3": (
        {"bf16": True},
        {"deepspeed": zero(3)["deepspeed"] | {"bf16": {"enabled": True}}},
        0.05,
    ),
}


def train(folder: Path, name: str, gpus: int, extra: dict[str, Any]) -> list[float]:
    """The losses of a run through the CLI."""
    teacher = {"base_model": str(folder / "teacher"), "dtype": "float32"}
    teacher |= extra.get("dskd", {}).get("teacher", {})
    config = tiny.base_config(
        folder,
        micro_batch_size=4 // gpus,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STEPS // 2,
        curriculum_sampling=True,
        output_dir=str(folder / name),
        **{**extra, "dskd": {"teacher": teacher}},
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path)]
    command += ["--launcher", "torchrun", "--", f"--nproc_per_node={gpus}"]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"DS_ACCELERATOR": "cuda", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / f"{name}.log"
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env=environment).returncode
    if code:
        raise RuntimeError(f"{name} ended with {code}:\n{log.read_text()[-3000:]}")
    state = json.loads((folder / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


class Report:
    """Prints one line a comparison and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    def compare(self, name: str, one: list[float], run: Any, tolerance: float) -> None:
        """Compare the losses that `run()` gives, step by step from the end."""
        try:
            found = run()
        except RuntimeError as error:
            self.failed = True
            print(f"{name}: FAILED\n{error}", flush=True)
            return
        worst = max(abs(a - b) for a, b in zip(one[-len(found) :], found, strict=True))
        self.failed |= not worst <= tolerance  # a NaN fails
        print(
            f"{name}: {len(found)} losses differ by at most {worst:.2g} ({tolerance})", flush=True
        )


def main(names: list[str]) -> None:
    """Run the named comparisons, or all."""
    gpus = torch.cuda.device_count()
    if not gpus:
        raise SystemExit("no CUDA device here: `make test` runs what CPUs can")
    folder, report = Path(tempfile.mkdtemp(prefix="dskd-gpu-")), Report()
    tiny.save_pair(folder, hidden_sizes=(64, 128))
    tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(64))

    def wanted(name: str) -> bool:
        return not names or name in names

    one = train(folder, "one", 1, {})
    for name, (extra, tolerance) in PRECISIONS.items():
        if wanted(name):
            report.compare(name, one, lambda n=name, e=extra: train(folder, n, 1, e), tolerance)
    if gpus < 2:
        print("one GPU: several were not compared")
        raise SystemExit(int(report.failed))
    for name, (extra, tolerance) in SHARDINGS.items():
        if wanted(name):
            report.compare(name, one, lambda n=name, e=extra: train(folder, n, 2, e), tolerance)
            again = extra | {
                "resume_from_checkpoint": str(folder / name / f"checkpoint-{STEPS // 2}")
            }
            report.compare(
                f"{name}, resumed",
                one,
                lambda n=name, e=again: train(folder, f"{n}-resumed", 2, e),
                tolerance,
            )
    for name, (both, sharded, tolerance) in PAIRS.items():
        if wanted(name):
            try:
                alone = train(folder, f"{name}-one", 1, both)
            except Exception as error:  # the other ways are compared all the same
                print(f"{name}: one GPU failed: {error}")
                report.failed = True
                continue
            extra = {**both, **sharded}
            report.compare(name, alone, lambda n=name, e=extra: train(folder, n, 2, e), tolerance)
    raise SystemExit(int(report.failed))


if __name__ == "__main__":
    main(sys.argv[1:])
