"""What the teacher costs from its cache, as ratios measured in one run.

- reading: tokens per second from files to states on the device, over the live teacher's forward,
  and `pread` against the memory map of safetensors;
- losses: 20 steps from the cache against the same steps with the live teacher;
- steps: processor time of a training step from the cache, and of the second epoch where the first
  one fills it, over plain fine-tuning with the same YAML, on a student whose forward and backward
  dominate;
- memory: bytes of all tensors alive at the end of a step, and the largest resident set.

The compared trainings run at the same time, each in a process of its own, and take turns: one step
of each, round by round. Whatever else the machine is doing meets all of them, so the ratio within
a round, and the median over rounds, can be trusted where times cannot.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_teacher.py   # a random teacher of 135M
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_teacher.py --teacher outputs/demo/teacher
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import itertools
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback

from axolotl_dskd.cache import Codec, RowReader, RowStore, shard_paths
from axolotl_dskd.teacher.cached.fill import CacheableRows, fill, missing_rows
from axolotl_dskd.teacher.cached.states import Body, CachedStates
from axolotl_dskd.teacher.cached.tables import EmbeddingTable
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.types import Needs
from tests.support import tiny

CPU = torch.device("cpu")


def timed(work: Any, repeats: int) -> float:
    """Median seconds of several runs, after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def reading(teacher: str | None, console: Console) -> None:
    """Live forward and cached reading of the same samples."""
    if teacher:
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    else:
        sizes = {"intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        model = tiny.tiny_llama(
            49152, 576, seed=0, num_key_value_heads=3, tie_word_embeddings=True, **sizes
        )
    body = LiveTeacher(model.eval(), 49152, CPU)
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 49000, generator.integers(60, 200)).tolist() for _ in range(16)]
    labels = [[-100] * 40 + i[40:] for i in ids]
    rows = CacheableRows([Dataset.from_dict({"teacher_input_ids": ids, "teacher_labels": labels})])
    batches = [np.arange(at, at + 8) for at in range(0, 16, 8)]
    collated = [rows.batch(batch, 0, CPU) for batch in batches]
    tokens = int(rows.tokens.sum())
    live = timed(lambda: [body(batch, Needs()) for batch in collated], 1)
    table = Table(
        title=f"Supervised tokens per second, {model.num_parameters() / 1e6:.0f}M teacher"
    )
    for head in ("from", "tokens/s", "over live", "by safetensors' memory map"):
        table.add_column(head, justify="right")
    table.add_row("live forward", f"{tokens / live:,.0f}", "1", "")
    for storage in ("float32", "bfloat16", "int8", "int4"):
        with tempfile.TemporaryDirectory() as folder:
            codec = Codec(storage, body.head.hidden_size)
            store = RowStore(Path(folder), codec.bytes_per_token)
            embedding = EmbeddingTable.of(model.get_input_embeddings())
            cache = CachedStates(store, codec, body.head, embedding, Body(lambda: body))
            fill(cache, rows, missing_rows(cache, rows))
            reader = RowReader(Path(folder), codec.bytes_per_token)

            def read(batch: Any, reader: RowReader = reader, codec: Codec = codec) -> None:
                sizes = batch.teacher_attention_mask.sum(1).tolist()
                sides = (batch.teacher_input_ids, batch.teacher_labels)
                unpadded = ([r[:n] for r, n in zip(s, sizes, strict=True)] for s in sides)
                states, found = reader.read_samples(*unpadded)
                assert found.all()
                codec.decode(states, torch.float32)

            def mapped(codec: Codec = codec, folder: str = folder) -> None:
                for path in shard_paths(Path(folder)):
                    with safe_open(path, framework="pt") as file:
                        ends = file.get_tensor("ends").tolist()
                        part = file.get_slice("states")
                        for group in range(0, len(ends), 8):
                            bounds = [0, *ends][group : group + 9]
                            pairs = itertools.pairwise(bounds)
                            codec.decode(torch.cat([part[a:b] for a, b in pairs]), torch.float32)

            seconds = timed(lambda r=read: [r(batch) for batch in collated], 20)
            other = timed(mapped, 20)
        speed = tokens / seconds
        table.add_row(
            storage, f"{speed:,.0f}", f"{speed * live / tokens:,.0f}", f"{tokens / other:,.0f}"
        )
    console.print(table)


class TakeTurns(TrainerCallback):
    """Waits for its turn before every step, and tells the processor time that the step took.

    Not the clock: what else runs on the machine would decide the ratios. Run with one thread,
    since waiting threads would be counted.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.alive = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps // 2:  # from here on the second epoch
            Path("/proc/self/clear_refs").write_text("5")
        self.pipe.send("ready")
        self.pipe.recv()
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pipe.send((int(state.epoch - 1e-6), time.process_time() - self.began))
        if state.global_step == state.max_steps:
            storages = {}
            for thing in gc.get_objects():
                if isinstance(thing, torch.Tensor) and not thing.is_meta:
                    storage = thing.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
            self.alive = sum(storages.values())


def most_resident() -> int:
    """Bytes, the most since the second epoch began."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def train(config: dict[str, Any], pipe: Connection) -> None:
    """`axolotl train`; sends each step, then what it ended with."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.train import train as axolotl_train
    from axolotl.utils.dict import DictDefault

    turns, original = TakeTurns(pipe), AxolotlTrainer.train

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(turns)
        return original(self, *args, **kwargs)

    AxolotlTrainer.train = watched
    cfg = load_cfg(DictDefault(config))
    _, _, trainer = axolotl_train(
        cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    pipe.send({"losses": losses, "alive": turns.alive, "resident": most_resident()})


def fill_ahead(config: dict[str, Any], pipe: Connection) -> None:
    """`axolotl-dskd cache write`."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    from axolotl_dskd.commands.cache import write_cache
    from axolotl_dskd.config import DSKDConfig

    cfg = load_cfg(DictDefault(config))
    block = DSKDConfig.of(cfg)
    assert block is not None
    write_cache(cfg, block, io.StringIO())
    pipe.send({})


def quietly(work: Any, *args: Any) -> None:
    """Run in a new process whose output goes to a file."""
    log = os.open(Path(tempfile.gettempdir()) / "bench_teacher.log", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    work(*args)


def start(work: Any, config: dict[str, Any]) -> tuple[Any, Connection]:
    """A process, and the end of its pipe."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=quietly, args=(work, config, theirs))
    process.start()
    theirs.close()
    return process, ours


def alone(work: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Run in a process of its own, without waiting for others; what it ended with."""
    process, pipe = start(work, config)
    while not isinstance(message := pipe.recv(), dict):
        if message == "ready":
            pipe.send("go")
    process.join()
    return message


def in_turns(configs: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train all of them, a step of each per round.

    Returns:
        per round `{run: (epoch, seconds)}`, and what every run ended with.
    """
    running: dict[str, tuple[Any, Connection]] = {}
    for what, config in configs.items():
        running[what] = start(train, config)
        assert running[what][1].recv() == "ready"
    rounds: list[dict[str, Any]] = []
    ends: dict[str, Any] = {}
    while running:
        order = list(running)
        if len(rounds) % 2:
            order.reverse()
        rounds.append({})
        for what in order:
            process, pipe = running[what]
            pipe.send("go")
            rounds[-1][what] = pipe.recv()
            if isinstance(then := pipe.recv(), dict):
                ends[what] = then
                process.join()
                del running[what]
    return rounds, ends


def farthest(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


def losses(console: Console) -> None:
    """Twenty steps of float32 training, from caches and live."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_pair(folder)

        def config(storage: str | None) -> dict[str, Any]:
            block: dict[str, Any] = {"base_model": str(folder / "teacher")}
            if storage:
                block["cache"] = {"path": str(folder / "cache"), "dtype": storage}
            return tiny.base_config(folder, max_steps=20, dskd={"teacher": block})

        live = alone(train, config(None))["losses"]
        table = Table(title="Losses of 20 steps from the cache")
        for head in ("dtype", "largest relative difference from the live teacher's"):
            table.add_column(head, justify="right")
        for storage in ("float32", "bfloat16", "int8"):
            alone(fill_ahead, config(storage))
            cached = alone(train, config(storage))["losses"]
            table.add_row(storage, f"{farthest(cached, live):.1e}")
    console.print(table)


def steps(console: Console, steps_per_epoch: int) -> None:
    """Training with and without a teacher."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_pair(folder)
        student = tiny.tiny_llama(
            400,
            384,
            seed=0,
            intermediate_size=1024,
            num_hidden_layers=16,
            max_position_embeddings=1024,
        )
        student.save_pretrained(folder / "student")
        teacher = tiny.tiny_llama(
            600,
            512,
            seed=1,
            intermediate_size=2048,
            num_hidden_layers=12,
            max_position_embeddings=1024,
        )
        teacher.save_pretrained(folder / "teacher")
        chance = random.Random(0)
        rows = []
        for number in range(2 * steps_per_epoch):  # of one length: the same sentences
            answer = " ".join(chance.sample(tiny.CORPUS[:8], 8))
            turns = [{"role": "user", "content": f"Say it ({number:02d})."}]
            rows.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
        tiny.write_rows(folder / "rows.jsonl", rows)

        def config(cache: str | None, **overrides: Any) -> dict[str, Any]:
            block: dict[str, Any] = {"base_model": str(folder / "teacher")}
            if cache:
                block["cache"] = {"path": str(folder / cache)}
            settings = {
                "dskd": {"teacher": block},
                "micro_batch_size": 2,
                "sequence_len": 1024,
                "learning_rate": 1e-4,  # at 1e-3 this student's loss jumps, and magnifies rounding
                "max_steps": None,
                "num_epochs": 2,
                "dataloader_num_workers": 1,
                "dataloader_prefetch_factor": 2,
            }
            return tiny.base_config(folder, **{**settings, **overrides})

        runs = {
            "plain fine-tuning": config(None, dskd=None, plugins=None),
            "live teacher": config(None),
            "filling the cache": config("during"),
            "from the cache": config("ahead"),
        }
        alone(fill_ahead, runs["from the cache"])
        rounds, ends = in_turns(runs)
    plain, *_ = runs
    body = 4 * (teacher.num_parameters() - 2 * 600 * 512) / 1e6
    title = (
        f"Steps of a {student.num_parameters() / 1e6:.0f}M student "
        f"(the {teacher.num_parameters() / 1e6:.0f}M teacher's layers take {body:.0f} MB), "
        f"{steps_per_epoch} rounds an epoch, in brackets the middle half of the rounds"
    )
    table = Table(title=title)
    table.add_column("run")
    heads = (
        "s a step",
        "epoch 1 / plain",
        "epoch 2 / plain",
        "tensors",
        "resident",
        "loss off live",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for what in runs:
        seconds = statistics.median(one[what][1] for one in rounds if one[what][0] == 1)
        cells = [f"{seconds:.2f}"]
        for epoch in (0, 1):
            ratios = [one[what][1] / one[plain][1] for one in rounds if one[what][0] == epoch]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.2f}-{high:.2f})")
        cells.append(f"{ends[what]['alive'] / 1e6:.0f} MB")
        cells.append(f"{(ends[what]['resident'] - ends[plain]['resident']) / 1e6:+.0f} MB")
        off = farthest(ends[what]["losses"], ends["live teacher"]["losses"])
        cells.append("-" if what == plain else f"{off:.1e}")
        table.add_row(what, *cells)
    console.print(table)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", help="folder of a teacher with 49,152 tokens")
    parser.add_argument("--only", choices=("reading", "losses", "steps"))
    parser.add_argument("--rounds", type=int, default=10, help="steps of each run, per epoch")
    arguments = parser.parse_args()
    console = Console(width=100)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    if arguments.only in (None, "reading"):
        reading(arguments.teacher, console)
    # Imported once, before the processes of the trainings fork.
    importlib.import_module("axolotl.train")
    importlib.import_module("axolotl_dskd.training.trainer")
    if arguments.only in (None, "losses"):
        losses(console)
    if arguments.only in (None, "steps"):
        steps(console, arguments.rounds)


if __name__ == "__main__":
    main()
