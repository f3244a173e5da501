"""What a served teacher costs: steps against the live teacher's, and bytes on the wire.

A real vLLM (`make vllm`) has one core, training another. Per round one step with each: the live
teacher, in training's own process; the same served, waited for once the student has run; and served
and asked ahead, as the trainer does it. All learn by `token_kd` at temperature 1 over one
vocabulary, from states and, where it is asked for them, from the 64 likeliest tokens. Ratios are
within a round, of the clock: waiting counts. Everything is new to the server in every step.

    python tests/benchmarks/bench_served.py                    # two servers, one after the other
    python tests/benchmarks/bench_served.py --layers 24 --width 768 --rounds 20
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import torch
from rich.console import Console
from rich.table import Table

from axolotl_dskd.config import DSKDConfig, TeacherConfig
from axolotl_dskd.models.heads import captured_head_input, output_head
from axolotl_dskd.objectives import Facts, Objective, Pair, build_objective
from axolotl_dskd.teacher import Teacher, TeacherSpec, TrainingRun, open_teacher
from axolotl_dskd.types import DualBatch, Matches, Needs, View
from tests.support import tiny
from tests.support.numbered import numbered_tokenizer
from tests.support.vllm import MISSING, PYTHON, VLLM

CPU = torch.device("cpu")
#: Of both models; texts use those ids that the tiny tokenizer has.
VOCABULARY, KNOWN = 32_000, 390
TOP = Needs("top")


def new_batch(rows: int, length: int, seed: int) -> DualBatch:
    """Rows of one length, two thirds of each supervised, the same on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, KNOWN, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 3] = -100
    segments = torch.arange(rows)[:, None].expand(rows, length)
    count = int((labels != -100).sum())
    tokens = torch.arange(count)
    pairs = tokens[:, None].expand(-1, 2)
    matches = Matches(pairs, pairs, pairs, pairs, tokens, tokens)
    return DualBatch(ids, labels, segments, ids, labels, torch.ones_like(ids), matches=matches)


class Student:
    """A small model that trains."""

    def __init__(self) -> None:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
        self.model: Any = tiny.tiny_llama(VOCABULARY, 256, 0, **sizes).train()
        # A rate at which random weights stay what they are; its arithmetic is the same.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-8)

    def step(self, teacher: Teacher, objective: Objective[Any], batch: DualBatch) -> None:
        """Forward, the teacher's say, loss, backward and update."""
        with captured_head_input(self.model) as captured:
            self.model(input_ids=batch.input_ids, use_cache=False)
        head = output_head(self.model, VOCABULARY)
        view = View(batch.student_side(), head, captured[0][batch.student_places])
        out = objective(view, teacher(batch, objective.needs), batch.matches)
        (out.loss / out.tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def opened(folder: Path, dtype: str = "float32", needs: Needs = TOP, **server: Any) -> Teacher:
    """The teacher of the folder, served where there are keys of a server."""
    block: dict[str, Any] = {"base_model": str(folder / "teacher"), "dtype": dtype}
    if server:
        block["server"] = server
    spec = TeacherSpec(TeacherConfig.model_validate(block), VOCABULARY, CPU)
    return open_teacher(spec, TrainingRun(needs=needs))


def objective_of(student: Student, gives: str) -> Objective[Any]:
    """`token_kd`, begun."""
    tokenizer = numbered_tokenizer(VOCABULARY)
    facts = Facts(tokenizer, tokenizer, (VOCABULARY, VOCABULARY))
    teacher = {"base_model": "x", "server": {"url": "http://a", "gives": gives}}
    block = {"teacher": teacher, "objective": {"name": "token_kd", "temperature": 1.0}}
    objective = build_objective(DSKDConfig.model_validate(block), facts, memory=8 << 30, seed=0)
    embedding = student.model.get_input_embeddings().weight.detach()
    objective.begin(Pair((output_head(student.model, VOCABULARY),), (embedding,), CPU))
    return objective


def bytes_per_token(teacher: Any, needs: Needs, args: argparse.Namespace) -> float:
    """Of answers, over the supervised tokens of a batch."""
    batch, sizes = new_batch(args.rows, args.length, seed=99), []
    ask = teacher.ahead.servers.ask

    async def counting(*arguments: Any, **keys: Any) -> Any:
        answer = await ask(*arguments, **keys)
        sizes.append(len(answer.content))
        return answer

    teacher.ahead.servers.ask = counting
    view = teacher(batch, needs)
    teacher.ahead.servers.ask = ask
    return sum(sizes) / len(view)


def rounds(steps: dict[str, Callable[[DualBatch], None]], args: argparse.Namespace) -> None:
    """Print how long steps take, over the live teacher's within each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for place, (name, step) in enumerate(steps.items()):
            batch = new_batch(args.rows, args.length, seed=100 * number + place)
            began = time.perf_counter()
            step(batch)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    table = Table(title=f"Steps of {args.rows} rows of {args.length} tokens")
    for head in ("teacher", "s a step", "steps/s", "steps/s over the live teacher's"):
        table.add_column(head, justify="right")
    live = next(iter(seconds.values()))
    for name, found in seconds.items():
        median = statistics.median(found)
        over = statistics.median(a / b for a, b in zip(live, found, strict=True))
        table.add_row(name, f"{median:.3f}", f"{1 / median:.2f}", f"{over:.2f}")
    Console(width=100).print(table)


def measure(folder: Path, gives: str, needs: dict[str, Needs], args: argparse.Namespace) -> None:
    """One server: steps, then bytes."""
    os.sched_setaffinity(0, {1})  # what is started now stays there
    server = VLLM.of_teacher(folder / "teacher", folder, gives=gives)
    server.env["VLLM_CPU_OMP_THREADS_BIND"] = "1"
    server.launch()
    os.sched_setaffinity(0, {0})
    server.wait()
    try:
        where = {"url": server.url, "gives": gives}
        student, served, live = Student(), opened(folder, **where), opened(folder)
        from_states, learned = (objective_of(student, kind) for kind in ("states", gives))

        def waiting(batch: DualBatch) -> None:
            student.step(served, learned, batch)

        def ahead(batch: DualBatch) -> None:
            served.expect([batch])
            student.step(served, learned, batch)

        steps = {
            "live": lambda batch: student.step(live, from_states, batch),
            f"served {gives}, waited for": waiting,
            f"served {gives}, asked ahead": ahead,
        }
        rounds(steps, args)
        for name, need in needs.items():
            dtype = name if gives == "states" else "float32"
            teacher = opened(folder, dtype, need, **where)
            print(f"{gives}, {name}: {bytes_per_token(teacher, need, args):,.0f} bytes a token")
    finally:
        server.stop()


def main() -> None:
    """Both kinds of servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit(MISSING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = {"num_attention_heads": args.width // 64, "num_key_value_heads": args.width // 64}
        model = tiny.tiny_llama(VOCABULARY, args.width, 1, num_hidden_layers=args.layers, **heads)
        print(f"teacher of {model.num_parameters() / 1e6:.0f}M, D = {args.width}")
        model.save_pretrained(folder / "teacher")
        tiny.byte_level_tokenizer().save_pretrained(folder / "teacher")
        states = {"float32": Needs(), "bfloat16": Needs()}
        measure(folder, "states", states, args)
        logprobs = {"labels": Needs("labels"), "64 likeliest": TOP}
        measure(folder, "logprobs", logprobs, args)


if __name__ == "__main__":
    main()
