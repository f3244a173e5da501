"""The demo: one student with and without a teacher on a CPU, by one call of `axolotl-dskd compare`.

Makes teacher and student, scores both as they are, and compares what training makes of the student.
"""
# ruff: noqa: E402 - settings that the later imports read come before them

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

# Before the heavy imports below, which read them.
os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    ACCELERATE_USE_CPU="true",
    CUDA_VISIBLE_DEVICES="",
    TOKENIZERS_PARALLELISM="false",
)
# GPU libraries that cannot load on a CPU say so at length while they are imported.
logging.disable(logging.WARNING)

import yaml
from rich.console import Console
from rich.table import Table
from score import score
from student import build_student
from teacher import export_teacher
from transformers.utils import logging as transformers_logging

from axolotl_dskd.commands.compare import run_compare

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = Path("example_configs/quickstart-cpu.yaml")
HELDOUT = HERE / "heldout.jsonl"

Config = dict[str, Any]


def read_yaml(path: Path) -> Config:
    """A YAML file as it is."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def show(console: Console, before: dict[str, Config], results: Config) -> None:
    """Print what both models were before, and every run."""
    table = Table(title="Each run, and both models before")
    table.add_column("model", no_wrap=True)
    heads = ("best\nepoch", "best\nbits/byte", "best\nright", "last\nbits/byte", "last\nright")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, only in before.items():
        bits, right = f"{only['bits_per_byte']:.4f}", f"{only['agreement']:.1%}"
        table.add_row(name, "", "", "", bits, right)
    for run in results["runs"]:
        cells = []
        for point in (run["best"], run["last"]):
            cells += [f"{point['dskd/bits_per_byte']:.4f}", f"{point['dskd/accuracy']:.1%}"]
        name = f"{run['method']}, seed {run['seed']}"
        table.add_row(name, f"{run['best']['epoch']:g}", *cells)
    console.print(table)
    console.print(
        "right: how often the first choice is the answer's next token. The teacher's counts its "
        "own tokens, so compare it with no student's."
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--runs", default="sft,dual_space", help="as of axolotl-dskd compare")
    return parser.parse_args()


def main() -> None:
    """Run all steps."""
    args = parse_arguments()
    os.chdir(ROOT)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    base = read_yaml(CONFIG)
    teacher_dir, student_dir = Path(base["dskd"]["teacher"]["base_model"]), Path(base["base_model"])
    out = student_dir.parent
    out.mkdir(parents=True, exist_ok=True)

    console = Console()
    console.print("Teacher and student, and what they are before any training ...")
    export_teacher(teacher_dir)
    build_student(teacher_dir, HERE / "train.jsonl", student_dir, base["seed"])
    before = {
        "teacher": score(teacher_dir, HELDOUT),
        "student, untrained": score(student_dir, HELDOUT),
    }
    results = run_compare(
        read_yaml,
        CONFIG,
        runs=args.runs,
        seeds=",".join(map(str, args.seeds)),
        held_out=str(HELDOUT),
        out=out / "compare",
        console=console,
    )
    (out / "results.json").write_text(json.dumps(before | results, indent=2) + "\n")
    show(console, before, results)


if __name__ == "__main__":
    main()
