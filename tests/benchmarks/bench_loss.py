"""Time and memory of every objective's loss, as ratios measured in one run.

Per objective: forward and backward of its chunked loss, over the bare matrix products that any
implementation of it must do with frozen heads (`Row.products`), and over its plain form: on full
logits as in the tests, or, for objectives by groups and samples, all tokens in one chunk. Peak
memory is what is held above inputs and heads. Every token has a partner, samples have 32 tokens;
dual space is measured from projected states on.

    python tests/benchmarks/bench_loss.py                       # the CPU sizes
    python tests/benchmarks/bench_loss.py --quick               # every objective in minutes
    python tests/benchmarks/bench_loss.py --objectives uld --sizes demo
    python tests/benchmarks/bench_loss.py --sizes llama-1b --tokens 1024 --objectives dual_space \
        --divergences skewed_reverse_kl --no-naive
    python tests/benchmarks/bench_loss.py --sizes large --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.config.objectives import DivergenceName
from axolotl_dskd.losses import Budget, Stream
from axolotl_dskd.objectives import Facts, Pair, build_objective
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Matches, Side, View
from tests.support import naive
from tests.support.dual_space import dual_space_loss, settings
from tests.support.numbered import numbered_tokenizer

#: name -> (tokens, d, D, V, U); over one vocabulary the student has the teacher's.
SIZES = {
    "tiny": (96, 32, 48, 600, 900),
    "demo": (256, 576, 576, 3_000, 49_152),
    "middle": (512, 576, 896, 49_152, 151_936),
    # Llama-3.2-1B ← Qwen2.5-7B as they are: on a CPU, and on a GPU.
    "llama-1b": (256, 2048, 3584, 128_256, 152_064),
    "large": (4096, 2048, 3584, 128_256, 152_064),
}
DIVERGENCES = get_args(DivergenceName)
#: Tokens of a sample.
SAMPLE = 32

#: A forward and backward that is ready to be measured.
Run = Callable[[], None]


class Products(NamedTuple):
    """Matrix products that cannot be saved: logits, and gradients of states, with each head."""

    student_logits: int
    student_gradients: int
    teacher_logits: int
    teacher_gradients: int


@dataclass
class Inputs:
    """Random states, heads and labels of one size."""

    student: torch.Tensor
    t2s: torch.Tensor
    s2t: torch.Tensor
    teacher: torch.Tensor
    student_head: torch.Tensor
    teacher_head: torch.Tensor
    student_labels: torch.Tensor
    teacher_labels: torch.Tensor

    @classmethod
    def make(
        cls,
        size: tuple[int, ...],
        device: str,
        dtype: torch.dtype,
        seed: int,
        one_vocabulary: bool,
    ) -> Inputs:
        """Logits of ordinary size: standard deviation about 2."""
        N, d, D, V, U = size
        if one_vocabulary:
            V = U
        generator = torch.Generator(device).manual_seed(seed)

        def randn(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            x = torch.randn(rows, columns, generator=generator, device=device)
            return (scale * x).to(dtype)

        def labels(vocabulary: int) -> torch.Tensor:
            return torch.randint(vocabulary, (N,), generator=generator, device=device)

        ours, theirs = labels(V), labels(U)
        return cls(
            randn(N, d).requires_grad_(),
            randn(N, d).requires_grad_(),
            randn(N, D).requires_grad_(),
            randn(N, D),
            randn(V, d, 2 * d**-0.5),
            randn(U, D, 2 * D**-0.5),
            ours,
            ours if one_vocabulary else theirs,
        )

    def views(self) -> tuple[View, View, Matches]:
        """As an objective is given them: token i is about the same text on both sides."""

        row = torch.arange(len(self.student), device=self.student.device)

        def view(labels: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor) -> View:
            read = torch.cat([torch.zeros_like(labels[:1]), labels[:-1]])
            return View(Side(read, labels, row // SAMPLE), OutputHead(weight), hidden)

        pairs, spans = row[:, None].expand(-1, 2), torch.stack([row, row + 1], 1)
        return (
            view(self.student_labels, self.student_head, self.student),
            view(self.teacher_labels, self.teacher_head, self.teacher),
            Matches(spans, spans, pairs, pairs, row, row),
        )

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All of both models at once."""
        return (
            naive.head_logits(self.student, self.student_head),
            naive.head_logits(self.teacher, self.teacher_head),
        )


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: objective and variant.
        products: its floor.
        ours: the package's loss, in chunks of so many tokens.
        plain: the same with all logits at once and autograd.
    """

    name: str
    products: Products
    ours: Callable[[Inputs, int], Run]
    plain: Callable[[Inputs], Run]
    one_vocabulary: bool = False


def dual_space(divergence: str) -> Row:
    """Student vocabulary: both logits and both gradients; teacher's: both logits, one gradient."""

    def ours(x: Inputs, chunk: int) -> Run:
        return lambda: dual_space_loss(
            student_hidden=x.student,
            student_labels=x.student_labels,
            student_head=OutputHead(x.student_head),
            settings=settings(divergence, chunk),
            t2s_hidden=x.t2s,
            s2t_hidden=x.s2t,
            teacher_hidden=x.teacher,
            teacher_labels=x.teacher_labels,
            teacher_head=OutputHead(x.teacher_head),
        ).loss.backward()

    def plain(x: Inputs) -> None:
        student, teacher = x.logits()
        terms = naive.dual_space(
            student,
            naive.head_logits(x.t2s, x.student_head),
            x.student_labels,
            teacher,
            naive.head_logits(x.s2t, x.teacher_head),
            name=divergence,
            temperature=2.0,
            mask_wrong=False,
        )
        (0.5 * sum(terms.values())).backward()

    return Row(f"dual_space {divergence}", Products(2, 2, 2, 1), ours, lambda x: partial(plain, x))


def built(
    name: str,
    config: dict[str, Any],
    products: Products,
    plain: Callable[[Inputs], dict[str, torch.Tensor]] | None = None,
    one_vocabulary: bool = False,
) -> Row:
    """An objective as a run builds it, over its plain form (None: all tokens in one chunk)."""

    def ours(x: Inputs, chunk: int) -> Run:
        block = {"teacher": {"base_model": "x"}, "objective": config, "chunk_tokens": chunk}
        sizes = len(x.student_head), len(x.teacher_head)
        facts = Facts(*map(numbered_tokenizer, sizes), sizes)
        objective = build_objective(DSKDConfig.model_validate(block), facts, memory=0, seed=0)
        student, teacher, matches = x.views()
        assert student.head is not None and teacher.head is not None
        weights = x.student_head, x.teacher_head  # of embeddings no row makes use
        objective.begin(Pair((student.head, teacher.head), weights, x.student.device))
        return lambda: objective(student, teacher, matches).loss.backward()

    def whole(x: Inputs) -> Run:
        if plain is None:
            return ours(x, len(x.student))
        return lambda: (0.5 * sum(plain(x).values())).backward()  # type: ignore[union-attr]

    return Row(name, products, ours, whole, one_vocabulary)


def token_kd(divergence: str) -> Row:
    """Both logits, the student's gradient."""

    def plain(x: Inputs) -> dict[str, torch.Tensor]:
        labels, pairs = (x.student_labels, x.teacher_labels), x.views()[2].exact
        return naive.token_kd(*x.logits(), *labels, pairs, name=divergence, temperature=2.0)

    config = {"name": "token_kd", "divergence": divergence}
    products = Products(1, 1, 1, 0)
    return built(f"token_kd {divergence}", config, products, plain, one_vocabulary=True)


def uld(top_k: int | None) -> Row:
    """Both logits, the student's gradient."""

    def plain(x: Inputs) -> dict[str, torch.Tensor]:
        pairs = x.views()[2].starts
        return naive.uld(*x.logits(), x.student_labels, pairs, temperature=1.0, top_k=top_k)

    config = {"name": "uld", "top_k": top_k or "all"}
    return built(f"uld top {top_k or 'all'}", config, Products(1, 1, 1, 0), plain)


#: Both logits, the student's gradient.
BOTH = Products(1, 1, 1, 0)

ROWS = [
    *(dual_space(name) for name in DIVERGENCES),
    *(token_kd(name) for name in DIVERGENCES),
    uld(4096),
    uld(None),
    built("min_edit", {"name": "min_edit", "map": "first_token"}, BOTH),
    built("sinkhorn", {"name": "sinkhorn"}, BOTH, one_vocabulary=True),
    # The student's logits twice: gradients are known when all of a chunk of text has been read.
    built("chunk_likelihood", {"name": "chunk_likelihood"}, Products(2, 1, 1, 0)),
    built("gold", {"name": "gold"}, BOTH),
    built("span_support", {"name": "span_support"}, BOTH),
]


def floor(x: Inputs, products: Products, chunk: int) -> None:
    """The bare matrix products, chunk by chunk, and nothing else."""
    sides = (
        (x.student, x.student_head, products.student_logits, products.student_gradients),
        (x.teacher, x.teacher_head, products.teacher_logits, products.teacher_gradients),
    )
    with torch.no_grad():
        for start in range(0, len(x.student), chunk):
            for states, head, forward, backward in sides:
                for _ in range(forward):
                    logits = states[start : start + chunk] @ head.T
                for _ in range(backward):
                    logits @ head


def clear(x: Inputs) -> None:
    """Drop gradients between runs."""
    for leaf in (x.student, x.t2s, x.s2t):
        leaf.grad = None
    gc.collect()


def seconds(run: Run, x: Inputs) -> float:
    """Time of one run: of the processors on a CPU, so that other work hardly counts."""
    clear(x)
    synchronize()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    run()
    synchronize()
    return clock() - began


def synchronize() -> None:
    """Wait for the GPU, where there is one at work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Run, x: Inputs, device: str) -> int:
    """Largest memory above what was there before: the allocator's on CUDA, else resident memory."""
    clear(x)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    import psutil

    process, peak, stop = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    stop.set()
    thread.join()
    return max(0, peak[0] - before)


def total_memory(device: str) -> int:
    """Of the device, in bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    return psutil.virtual_memory().total


def chunk_tokens(x: Inputs, device: str) -> int:
    """Of the package's own choice, and such that there are four chunks at least."""
    student, teacher, _ = x.views()
    assert student.head is not None and teacher.head is not None
    streams = Stream(x.student, student.head), Stream(x.teacher, teacher.head)
    return min(Budget(memory=total_memory(device)).size(*streams), len(x.student) // 4)


def print_table(size: str, args: argparse.Namespace) -> None:
    """Measure one size and print its Markdown table."""
    N, d, D, V, U = numbers = (args.tokens or SIZES[size][0], *SIZES[size][1:])
    print(
        f"\n{size}: N=M={N}, d={d}, D={D}, V={V:,}, U={U:,} (both {U:,} for token_kd, sinkhorn)\n"
    )
    print(
        "| objective | chunk | products | s | / products | / plain form | peak MiB | / plain form |"
    )
    print("|---|---|---|---|---|---|---|---|")
    inputs: dict[bool, Inputs] = {}
    for row in args.rows:
        if row.one_vocabulary not in inputs:
            inputs = {}  # one set at a time
            dtype = getattr(torch, args.dtype)
            made = Inputs.make(numbers, args.device, dtype, args.seed, row.one_vocabulary)
            inputs[row.one_vocabulary] = made
        print_row(row, inputs[row.one_vocabulary], args)


def print_row(row: Row, x: Inputs, args: argparse.Namespace) -> None:
    """Measure one objective and print its line."""
    chunk, N = chunk_tokens(x, args.device), len(x.student)
    bare = partial(floor, x, row.products)
    # The floor may use the whole batch as one chunk where that suits the machine better.
    best = min((chunk, N), key=lambda c: min(seconds(partial(bare, c), x) for _ in range(2)))
    runs: dict[str, Run] = {"ours": row.ours(x, chunk), "floor": partial(bare, best)}
    if not args.no_naive:
        runs["plain"] = row.plain(x)
    memory = {n: peak_bytes(run, x, args.device) for n, run in runs.items() if n != "floor"}
    # In turn, and ratios within each round: what else the machine does hits all alike.
    rounds = [{n: seconds(run, x) for n, run in runs.items()} for _ in range(args.repeats)]

    def ratio(to: str) -> float:
        return statistics.median(r["ours"] / r[to] for r in rounds)

    took = statistics.median(r["ours"] for r in rounds)
    cells = ("", "")
    if "plain" in runs:
        cells = (f"{ratio('plain'):.2f}", f"{memory['ours'] / max(memory['plain'], 1):.3f}")
    print(
        f"| {row.name} | {chunk} | {sum(row.products)} | {took:.3f} | {ratio('floor'):.2f} "
        f"| {cells[0]} | {memory['ours'] / 2**20:.0f} | {cells[1]} |",
        flush=True,
    )


def main() -> None:
    """Print where it ran, then one table per size."""
    names = sorted({row.name.split()[0] for row in ROWS})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["demo", "middle"])
    parser.add_argument("--objectives", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--divergences",
        nargs="+",
        choices=DIVERGENCES,
        default=DIVERGENCES,
        help="of the objectives that have a choice",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, help="instead of the size's own number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-naive", action="store_true", help="skip the plain form")
    parser.add_argument(
        "--quick", action="store_true", help="the demo's size, one divergence of each objective"
    )
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.divergences = ["demo"], ["forward_kl"]
    # Maps of vocabularies that no run has.
    os.environ["AXOLOTL_DSKD_CACHE"] = tempfile.mkdtemp(prefix="bench-loss-")
    left_out = set(DIVERGENCES) - set(args.divergences)
    args.rows = [
        row
        for row in ROWS
        if row.name.split()[0] in args.objectives and row.name.split()[-1] not in left_out
    ]
    machine = (
        torch.cuda.get_device_name(0)
        if args.device == "cuda"
        else f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {machine}, {args.dtype}, "
        f"seed {args.seed}, median of {args.repeats} rounds"
    )
    for size in args.sizes:
        print_table(size, args)


if __name__ == "__main__":
    main()
