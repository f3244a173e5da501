"""What CPUs cannot run: two GPUs through `axolotl train`, sharded in every way, against one GPU.

    python tests/gpu/run.py            # all; needs two GPUs
    python tests/gpu/run.py fsdp2

Prints the largest difference of the losses of ten steps; ends with 1 if one is above 1e-4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests import tiny
from tests.test_ranks import SHARDED

STEPS = 10
TOLERANCE = 1e-4


def train(folder: Path, name: str, gpus: int, extra: dict[str, Any]) -> list[float]:
    """The losses of a run through the CLI."""
    config = tiny.base_config(
        folder,
        micro_batch_size=4 // gpus,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STEPS,
        curriculum_sampling=True,
        output_dir=str(folder / name),
        **{"dskd": {"teacher": {"base_model": str(folder / "teacher"), "dtype": "float32"}}},
        **extra,
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path)]
    command += ["--launcher", "torchrun", "--", f"--nproc_per_node={gpus}"]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    log = folder / f"{name}.log"
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env=environment).returncode
    if code:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-4000:]}")
    state = json.loads((folder / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def main(names: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="dskd-gpu-"))
    tiny.save_pair(folder, hidden_sizes=(64, 128))
    tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(64))
    ways: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": SHARDED}
    one = train(folder, "one", 1, {})
    failed = False
    for name in names or ways:
        found = train(folder, name, 2, ways[name])
        worst = max(abs(a - b) for a, b in zip(one, found, strict=True))
        failed |= worst > TOLERANCE
        print(f"{name}: losses of {STEPS} steps differ by at most {worst:.2g}")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
