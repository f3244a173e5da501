"""What a training step costs with a teacher, over plain fine-tuning, at real models' proportions.

For named pairs of models: a step (forward, loss, backward, optimizer) of plain fine-tuning, with
the live teacher, and of every objective with the teacher's states at hand, as from its cache;
where all of the student trains, and with LoRA on its layers, whose head is frozen. The runs take
turns, and ratios are taken within each round, so that whatever else the machine does meets all.

On a CPU the pairs are scaled down with their proportions kept: output heads and the teacher's
layers over the student's layers, hidden sizes and vocabularies over one another (`scaled`). Times
are of the processor there. Weights and tokens are random; of a row's tokens, `--supervised` are
trained on, and seven of ten of these have an exact partner. Plain fine-tuning computes the logits
of all positions, as transformers does. What reading a cache takes is `bench_teacher`'s. Rounds in
multiples of 16 have their share of what dual space does in every 16th step.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py      # hours: all pairs and objectives
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py --pairs llama-1b --objectives dual_space
    python tests/benchmarks/bench_step.py --device cuda --rows 4 --length 1024   # real sizes, bf16
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.machine import total_memory
from axolotl_dskd.models.heads import captured_head_input, output_head, single
from axolotl_dskd.objectives import Facts, Objective, Pair, build_objective
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.types import DualBatch, Matches, Side, View
from tests.support.numbered import numbered_tokenizer


@dataclass(frozen=True)
class Shape:
    """A model. `head_size`, `heads`, `kv_heads` are of its attention."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def body(self) -> int:
        """Weights of all layers."""
        return self.layers * self.layer

    def build(self, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        """With random weights."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            tie_word_embeddings=self.tied,
        )
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, dtype=dtype)


#: name -> student, teacher. One vocabulary: the rows that both heads have.
PAIRS = {
    "llama-1b": (
        "Llama-3.2-1B ← Qwen2.5-7B",
        Shape(2048, 8192, 16, 32, 8, 64, 128_256, True),
        Shape(3584, 18_944, 28, 28, 4, 128, 152_064, False),
    ),
    "qwen-0.5b": (
        "Qwen2.5-0.5B ← Qwen2.5-7B, one vocabulary",
        Shape(896, 4864, 24, 14, 2, 64, 151_936, True),
        Shape(3584, 18_944, 28, 28, 4, 128, 151_936, False),
    ),
    "llama-8b": (
        "Llama-3.1-8B ← Qwen2.5-32B",
        Shape(4096, 14_336, 32, 32, 8, 128, 128_256, False),
        Shape(5120, 27_648, 64, 40, 8, 128, 152_064, False),
    ),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dual_space": {},
    "dual_space_quarter": {"name": "dual_space", "teacher_space_share": 0.25},
    "token_kd": {},
    "sinkhorn": {},
    "uld": {},
    "min_edit": {"map": "first_token"},
    "chunk_likelihood": {},
    "gold": {},
    "span_support": {},
}


def scaled(student: Shape, teacher: Shape, hidden: int, layers: int) -> tuple[Shape, Shape]:
    """A small pair in which heads and the teacher's layers cost what they do in the large one,
    as shares of the student's layers, and sizes of both sides have the same proportions."""

    def small(width: int, depth: int, like: Shape, vocabulary: int) -> Shape:
        heads = width // 32
        return Shape(width, 4 * width, depth, heads, heads // 3, 32, vocabulary, like.tied)

    ours = small(hidden, layers, student, 0)
    factor = student.hidden / student.body * ours.body / hidden  # of both vocabularies
    width = 96 * round(hidden * teacher.hidden / student.hidden / 96)
    sizes = [round(factor * student.vocabulary), round(factor * teacher.vocabulary)]
    # Its width was rounded; its head shall cost what it does all the same.
    share = teacher.hidden * teacher.vocabulary / student.body
    sizes[1] = sizes[1] if sizes[0] == sizes[1] else round(share * ours.body / width)
    theirs = small(width, 1, teacher, sizes[1])
    depth = max(1, round(teacher.body / student.body * ours.body / theirs.layer))
    return replace(ours, vocabulary=sizes[0]), replace(theirs, layers=depth)


@dataclass(frozen=True)
class Data:
    """A micro-batch."""

    batch: DualBatch
    side: Side

    @classmethod
    def make(cls, shapes: tuple[Shape, Shape], args: argparse.Namespace) -> Data:
        """Rows of `--length` tokens on both sides, whose later part is supervised."""
        sizes = shapes[0].vocabulary, shapes[1].vocabulary
        chance, device = random.Random(args.seed), args.device
        generator = torch.Generator().manual_seed(args.seed)
        wanted = round(args.supervised * args.length)
        ids = [torch.randint(256, n, (args.rows, args.length), generator=generator) for n in sizes]
        if sizes[0] == sizes[1]:
            ids[1] = ids[0]
        spans: tuple[list[Any], list[Any]] = ([], [])
        numbers: tuple[list[int], list[int]] = ([], [])
        exact, starts, counts, group = [], [], [], 0
        for _ in range(args.rows):
            at, left = 0, [wanted, wanted]
            while min(left) > 0:
                split = (1, 1)
                if sizes[0] != sizes[1] and min(left) > 1 and chance.random() > 0.6:
                    split = chance.choice([(1, 2), (2, 1)])
                begin = len(numbers[0]), len(numbers[1])
                starts.append(begin)
                if split == (1, 1):
                    exact.append(begin)
                for side, count in enumerate(split):
                    width = 4 // count
                    spans[side].extend((at + k * width, at + (k + 1) * width) for k in range(count))
                    numbers[side].extend([group] * count)
                    left[side] -= count
                at, group = at + 4, group + 1
            counts.append([wanted - rest for rest in left])
        labels = [torch.full_like(x, -100) for x in ids]
        for row, both in enumerate(counts):
            for side, count in enumerate(both):
                labels[side][row, args.length - count :] = ids[side][row, args.length - count :]
        tables = (*spans, exact, starts, *numbers)
        matches = Matches(*(torch.tensor(table, device=device) for table in tables))
        rows = torch.arange(args.rows)[:, None].expand(-1, args.length)
        tensors = (ids[0], labels[0], rows, ids[1], labels[1], torch.ones_like(ids[1]))
        batch = DualBatch(*(x.to(device) for x in tensors), matches=matches)
        return cls(batch, batch.student_side())


@dataclass(frozen=True)
class Bench:
    """A student with its optimizer, the teacher's head, and a batch."""

    student: Any
    optimizer: torch.optim.Optimizer
    teacher: LiveTeacher
    data: Data
    states: Tensor
    memory: int

    def plain(self) -> None:
        """A step of plain fine-tuning, by the model's own loss."""
        batch = self.data.batch
        self._learn(self.student(input_ids=batch.input_ids, labels=batch.labels).loss)

    def distilling(self, name: str, *, live: bool) -> Callable[[], None]:
        """A step with an objective; it begins here."""
        objective = self._objective(name)
        beside = objective.module
        moves = None if beside is None else torch.optim.AdamW(beside.parameters(), lr=1e-5)
        batch, count = self.data.batch, [0]

        def step() -> None:
            with captured_head_input(self.student) as captured:
                self.student(input_ids=batch.input_ids, use_cache=False)
            hidden = single(captured, self.student)[batch.student_places]
            head, embedded = self._head(), None
            objective.follow(count[0], head)
            count[0] += 1
            if objective.needs.embeddings:
                table = self.student.get_input_embeddings().weight.detach()
                embedded = table[self.data.side.input_ids], table[self.data.side.labels]
            teacher = self.teacher(batch, objective.needs) if live else self._cached(objective)
            out = objective(View(self.data.side, head, hidden, embedded), teacher, batch.matches)
            self._learn(out.loss / out.tokens)
            if moves is not None:
                moves.step()
                moves.zero_grad()

        return step

    def _objective(self, name: str) -> Objective[Any]:
        heads = self._head(), self.teacher.head
        block = {"teacher": {"base_model": "x"}, "objective": {"name": name, **OBJECTIVES[name]}}
        sizes = heads[0].vocab_size, heads[1].vocab_size
        facts = Facts(*map(numbered_tokenizer, sizes), sizes, exact_share=0.7)
        config = DSKDConfig.model_validate(block)
        objective = build_objective(config, facts, memory=self.memory, seed=0)
        embedding = self.student.get_input_embeddings().weight.detach()
        pair = Pair(heads, (embedding, self.teacher.embedding), embedding.device)
        objective.begin(pair)
        return objective

    def _head(self) -> OutputHead:
        return output_head(self.student, self.student.config.vocab_size)

    def _cached(self, objective: Objective[Any]) -> View:
        side = self.data.batch.teacher_side()
        embedded = None
        if objective.needs.embeddings:
            table = self.teacher.embedding
            embedded = table[side.input_ids], table[side.labels]
        return View(side, self.teacher.head, self.states, embedded)

    def _learn(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(step: Callable[[], None], device: str) -> float:
    """Of a step: the processor's on a CPU, the clock's where a GPU works."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = clock()
    step()
    wait()
    return clock() - began


def measure(shapes: tuple[Shape, Shape], tuned: str, args: argparse.Namespace) -> None:
    """Print the rows of one pair, trained in one way."""
    device, dtype = torch.device(args.device), torch.bfloat16
    dtype = dtype if args.device == "cuda" else torch.float32
    student: Any = shapes[0].build(device, dtype)
    if tuned == "LoRA":
        student = get_peft_model(student, LoraConfig(r=16, target_modules="all-linear"))
    theirs = replace(shapes[1], layers=0) if args.no_live else shapes[1]
    model = theirs.build(device, dtype).eval().requires_grad_(False)
    teacher = LiveTeacher(model, theirs.vocabulary, device)
    data = Data.make(shapes, args)
    side = data.batch.teacher_side()
    states = torch.randn(len(side), theirs.hidden, device=device).to(dtype)
    trained = [p for p in student.parameters() if p.requires_grad]
    # A rate at which random weights stay what they are; its arithmetic is the same.
    optimizer = torch.optim.AdamW(trained, lr=1e-8)
    bench = Bench(student.train(), optimizer, teacher, data, states, total_memory(device))
    one = shapes[0].vocabulary == shapes[1].vocabulary
    steps = {"plain fine-tuning": bench.plain}
    if not args.no_live:
        steps["dual_space, live teacher"] = bench.distilling("dual_space", live=True)
    for name in args.objectives:
        if one or name != "token_kd":
            steps[f"{name}, cached"] = bench.distilling(name, live=False)
    for step in steps.values():  # to warm up
        step()
    rounds = []
    for number in range(args.rounds):
        order = list(steps) if number % 2 == 0 else list(steps)[::-1]
        rounds.append({name: seconds(steps[name], args.device) for name in order})
    for name in steps:
        ratios = sorted(r[name] / r["plain fine-tuning"] for r in rounds)
        quarter = len(ratios) // 4
        took, plain = (statistics.mean(r[k] for r in rounds) for k in (name, "plain fine-tuning"))
        found = f"{took / plain:.2f} ({ratios[quarter]:.2f}-{ratios[-1 - quarter]:.2f})"
        print(f"| {args.title} | {tuned} | {name} | {took:.3f} | {found} |", flush=True)


def main() -> None:
    """Print where it ran and one Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument(
        "--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES)
    )
    parser.add_argument("--tune", nargs="+", choices=["full", "LoRA"], default=["full", "LoRA"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--supervised", type=float, default=0.6, help="share of a row's tokens")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--no-live", action="store_true", help="build no layers of the teacher")
    parser.add_argument("--hidden", type=int, default=384, help="of the scaled student")
    parser.add_argument("--layers", type=int, default=16, help="of the scaled student")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["AXOLOTL_DSKD_CACHE"] = tempfile.mkdtemp(prefix="bench-step-")
    logging.disable(logging.WARNING)  # random weights: what objectives warn of is known
    where = platform.processor() or platform.machine()
    if args.device == "cuda":
        where = torch.cuda.get_device_name(0)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {where}, "
        f"{torch.get_num_threads()} threads; {args.rows} rows of {args.length} tokens, "
        f"{args.supervised:.0%} supervised; mean (middle half) of {args.rounds} rounds\n"
    )
    tables = []
    for key in args.pairs:
        title, student, teacher = PAIRS[key]
        shapes = student, teacher
        if args.device == "cpu":
            shapes = scaled(student, teacher, args.hidden, args.layers)
        tables.append((title, shapes))
        body = shapes[0].body
        heads = (s.hidden * s.vocabulary / body for s in shapes)
        print(
            f"{title}: student {body / 1e6:.1f}M in layers, heads {next(heads):.2f} and "
            f"{next(heads):.2f} of it, teacher's layers {shapes[1].body / body:.1f}; hidden "
            f"{shapes[0].hidden}, {shapes[1].hidden}, vocabularies {shapes[0].vocabulary:,}, "
            f"{shapes[1].vocabulary:,}\n"
        )
    print("| pair | trained | run | s a step | / plain |\n|---|---|---|---|---|")
    for args.title, shapes in tables:
        for tuned in args.tune:
            measure(shapes, tuned, args)
            gc.collect()


if __name__ == "__main__":
    main()
