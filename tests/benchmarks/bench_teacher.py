"""What the teacher costs from its cache, as ratios measured in one run.

- reading: tokens per second from files to states on the device, over the live teacher's forward,
  and `pread` against the memory map of safetensors;
- steps: median processor time of a training step from the cache, and of the second epoch where
  the first one fills it, over plain fine-tuning with the same YAML, on a student whose forward and
  backward dominate;
- memory: bytes of all tensors alive at the end of a step.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_teacher.py   # a random teacher of 135M
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_teacher.py --teacher outputs/demo/teacher
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import random
import statistics
import sys
import tempfile
import time
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
from axolotl_dskd.teacher import CacheableRows, CachedTeacher, LiveTeacher, fill, missing_rows
from axolotl_dskd.teacher.tables import EmbeddingTable
from tests import tiny

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
    live = timed(lambda: [body(batch) for batch in collated], 1)
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
            embedding = EmbeddingTable.of(body.embedding)
            cached = CachedTeacher(store, codec, body.head, embedding, lambda: body)
            fill(cached, rows, missing_rows(cached, rows), CPU)
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


class Watch(TrainerCallback):
    """Processor time of each step by epoch, and the tensors alive at its end.

    Not the clock: what else runs on the machine would decide the ratios. Run with one thread,
    since waiting threads would be counted.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.alive = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.process_time() - self.began
        self.seconds.setdefault(int(state.epoch - 1e-6), []).append(seconds)
        if state.global_step == state.max_steps:
            storages = {}
            for thing in gc.get_objects():
                if isinstance(thing, torch.Tensor) and not thing.is_meta:
                    storage = thing.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
            self.alive = sum(storages.values())


def train(config: dict[str, Any]) -> Watch:
    """`axolotl train` in this process."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.train import train as axolotl_train
    from axolotl.utils.dict import DictDefault

    watch, original = Watch(), AxolotlTrainer.train

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(watch)
        return original(self, *args, **kwargs)

    cfg = load_cfg(DictDefault(config))
    AxolotlTrainer.train = watched
    try:
        meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
        axolotl_train(cfg=cfg, dataset_meta=meta)
    finally:
        AxolotlTrainer.train = original
    gc.collect()
    return watch


def steps(console: Console) -> None:
    """Training with and without a teacher."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_pair(folder)
        student = tiny.tiny_llama(400, 384, seed=0, intermediate_size=1024, num_hidden_layers=16)
        student.save_pretrained(folder / "student")
        teacher = tiny.tiny_llama(600, 512, seed=1, intermediate_size=2048, num_hidden_layers=12)
        teacher.save_pretrained(folder / "teacher")
        chance = random.Random(0)
        rows = []
        for number in range(12):
            answer = " ".join(chance.sample(tiny.CORPUS[:8], 1))
            turns = [{"role": "user", "content": f"Say it ({number})."}]
            rows.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
        tiny.write_rows(folder / "rows.jsonl", rows)

        def config(cache: str | None, **overrides: Any) -> dict[str, Any]:
            block: dict[str, Any] = {"base_model": str(folder / "teacher")}
            if cache:
                block["cache"] = {"path": str(folder / cache)}
            settings = {
                "dskd": {"teacher": block},
                "micro_batch_size": 2,
                "sequence_len": 512,
                "max_steps": None,
                "num_epochs": 2,
                "dataloader_num_workers": 1,
                "dataloader_prefetch_factor": 2,
            }
            return tiny.base_config(folder, **{**settings, **overrides})

        runs = {
            "plain fine-tuning": config(None, dskd=None, plugins=None),
            "live teacher": config(None),
            "filling the cache": config("cache"),
            "from the cache": config("cache"),
        }
        found = {what: train(one) for what, one in runs.items()}
    plain = found["plain fine-tuning"]
    base = statistics.median(plain.seconds[1])
    body = 4 * (teacher.num_parameters() - 2 * 600 * 512) / 1e6
    title = (
        f"Steps of a {student.num_parameters() / 1e6:.0f}M student "
        f"(the {teacher.num_parameters() / 1e6:.0f}M teacher's layers take {body:.0f} MB)"
    )
    table = Table(title=title)
    heads = ("epoch 1", "over plain", "epoch 2", "over plain", "tensors alive at the end")
    table.add_column("run")
    for head in heads:
        table.add_column(head, justify="right")
    for what, watch in found.items():
        first, second = (statistics.median(watch.seconds[e]) for e in (0, 1))
        table.add_row(
            what,
            f"{first:.2f} s",
            f"{first / base:.2f}",
            f"{second:.2f} s",
            f"{second / base:.2f}",
            f"{watch.alive / 1e6:.0f} MB",
        )
    console.print(table)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", help="folder of a teacher with 49,152 tokens")
    parser.add_argument("--only", choices=("reading", "steps"))
    arguments = parser.parse_args()
    console = Console(width=100)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    if arguments.only != "steps":
        reading(arguments.teacher, console)
    if arguments.only != "reading":
        steps(console)


if __name__ == "__main__":
    main()
