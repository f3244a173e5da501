"""Leaves what a training leaves for a comparison, in a second: `python -m …recorded_training YAML`.

Its numbers follow from the configuration alone. What a real training leaves is tested where real
ones run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

EPOCHS = 4
ANSWER = {
    "prompt": "Say <b>hello</b>.",
    "reference": "Hello & welcome.",
    "greedy": "<img src=http://x>",
    "sampled": "",
    "rouge_l": 0.5,
    "rouge_l_sampled": 0.0,
}
PAUSE = float(os.environ.get("RECORDED_TRAINING_PAUSE", "0.15"))


def append_line(folder: str, line: dict[str, Any]) -> None:
    """As `axolotl_dskd.evaluation` does, which takes seconds to import."""
    path = Path(folder) / "dskd-record.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main(path: str) -> None:
    """A run of the objective gold fails in its first epoch."""
    config = yaml.safe_load(Path(path).read_text())
    out, block, seed = config["output_dir"], config["dskd"], config["seed"]
    told = json.dumps([block.get("kd_ratio"), block.get("objective"), seed])
    number = int(hashlib.sha256(told.encode()).hexdigest()[:6], 16) / 0xFFFFFF
    append_line(out, {"train": {"rows": 16, "digest": f"rows of seed {seed}"}})
    for epoch in range(EPOCHS + 1):
        if epoch == 1 and block.get("objective", {}).get("name") == "gold":
            sys.exit("the weights of gold are damaged")
        nats = dict.fromkeys("abcdef", 9.0 - epoch + number)
        append_line(
            out,
            {
                "evaluation": "eval",
                "step": epoch,
                "epoch": epoch,
                "metrics": {"eval_loss": number, "eval_dskd/rouge_l": 0.5},
                "learned_tokens": 100 * epoch,
                "gpu_bytes": 0,
                "answers": [ANSWER] * (epoch == EPOCHS),
                "rows": {key: [value, 12, 5, 2.0] for key, value in nats.items()},
            },
        )
        append_line(out, {"log": {"loss": number}, "step": epoch, "max_steps": EPOCHS})
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(sys.argv[1])
