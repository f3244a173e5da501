"""Time and memory of the dual-space loss, as ratios measured in one run.

Per divergence: forward and backward of our chunked loss, over the seven bare matrix products that
any implementation must do (student vocabulary: student logits, projected logits, two hidden
gradients; teacher vocabulary: teacher logits, projected logits, one hidden gradient), and over the
plain full-logits form of the tests. Peak memory is what is held above inputs and heads.

    python tests/benchmarks/bench_loss.py                       # the CPU sizes
    python tests/benchmarks/bench_loss.py --sizes large --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from axolotl_dskd.config import DivergenceName
from axolotl_dskd.losses import make_divergence
from axolotl_dskd.objectives.dual_space.loss import LossSettings, auto_chunk_tokens, dual_space_loss
from axolotl_dskd.output_head import OutputHead
from tests.support import naive

#: name -> (tokens, d, D, V, U)
SIZES = {
    "demo": (256, 576, 576, 3_000, 49_152),
    "middle": (512, 576, 896, 49_152, 151_936),
    "large": (4096, 2048, 3584, 128_256, 151_936),
}
DIVERGENCES = get_args(DivergenceName)


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
    def make(cls, size: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Inputs:
        """Logits of ordinary size: standard deviation about 2."""
        N, d, D, V, U = size
        generator = torch.Generator(device).manual_seed(seed)

        def randn(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            x = torch.randn(rows, columns, generator=generator, device=device)
            return (scale * x).to(dtype)

        def labels(vocabulary: int) -> torch.Tensor:
            return torch.randint(vocabulary, (N,), generator=generator, device=device)

        return cls(
            randn(N, d).requires_grad_(),
            randn(N, d).requires_grad_(),
            randn(N, D).requires_grad_(),
            randn(N, D),
            randn(V, d, 2 * d**-0.5),
            randn(U, D, 2 * D**-0.5),
            labels(V),
            labels(U),
        )


def ours(x: Inputs, name: str, chunk: int) -> None:
    """Forward and backward of the package's loss."""
    out = dual_space_loss(
        student_hidden=x.student,
        student_labels=x.student_labels,
        student_head=OutputHead(x.student_head),
        settings=LossSettings(make_divergence(name), chunk_tokens=chunk),
        t2s_hidden=x.t2s,
        s2t_hidden=x.s2t,
        teacher_hidden=x.teacher,
        teacher_labels=x.teacher_labels,
        teacher_head=OutputHead(x.teacher_head),
    )
    out.loss.backward()


def plain(x: Inputs, name: str) -> None:
    """The same with all logits at once and autograd."""
    terms = naive.dual_space(
        naive.head_logits(x.student, x.student_head),
        naive.head_logits(x.t2s, x.student_head),
        x.student_labels,
        naive.head_logits(x.teacher, x.teacher_head),
        naive.head_logits(x.s2t, x.teacher_head),
        name=name,
        temperature=2.0,
        mask_wrong=False,
    )
    (0.5 * sum(terms.values())).backward()


def floor(x: Inputs, chunk: int) -> None:
    """The seven matrix products, chunk by chunk, and nothing else."""
    with torch.no_grad():
        for start in range(0, len(x.student), chunk):
            rows = slice(start, start + chunk)
            for states in (x.student, x.t2s):
                logits = states[rows] @ x.student_head.T
                logits @ x.student_head
            x.teacher[rows] @ x.teacher_head.T
            logits = x.s2t[rows] @ x.teacher_head.T
            logits @ x.teacher_head


def clear(x: Inputs) -> None:
    """Drop gradients between runs."""
    for leaf in (x.student, x.t2s, x.s2t):
        leaf.grad = None
    gc.collect()


def seconds(run: Callable[[], None], x: Inputs) -> float:
    """Wall time of one run."""
    clear(x)
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, where there is one at work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], None], x: Inputs, device: str) -> int:
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


def print_table(size: str, args: argparse.Namespace) -> None:
    """Measure one size and print its Markdown table."""
    N, d, D, V, U = SIZES[size]
    x = Inputs.make(SIZES[size], args.device, getattr(torch, args.dtype), args.seed)
    chunk = auto_chunk_tokens(total_memory(args.device), (V, U), x.student.dtype)
    print(f"\n{size}: N=M={N}, d={d}, D={D}, V={V:,}, U={U:,}, chunk {chunk}\n")
    print("| divergence | s | / seven products | / plain form | peak MiB | / plain form |")
    print("|---|---|---|---|---|---|")
    # The floor may use the whole batch as one chunk where that suits the machine better.
    bare = min((chunk, N), key=lambda c: min(seconds(partial(floor, x, c), x) for _ in range(2)))
    for name in args.divergences:
        runs = {"ours": partial(ours, x, name, chunk), "floor": partial(floor, x, bare)}
        if not args.no_naive:
            runs["plain"] = partial(plain, x, name)
        memory = {n: peak_bytes(run, x, args.device) for n, run in runs.items() if n != "floor"}
        # In turn, and ratios within each round: what else the machine does hits all alike.
        rounds = [{n: seconds(run, x) for n, run in runs.items()} for _ in range(args.repeats)]

        def ratio(to: str, rounds: list[dict[str, float]] = rounds) -> float:
            return statistics.median(r["ours"] / r[to] for r in rounds)

        took = statistics.median(r["ours"] for r in rounds)
        cells = ("", "")
        if "plain" in runs:
            cells = (f"{ratio('plain'):.2f}", f"{memory['ours'] / memory['plain']:.3f}")
        print(
            f"| {name} | {took:.3f} | {ratio('floor'):.2f} | {cells[0]} "
            f"| {memory['ours'] / 2**20:.0f} | {cells[1]} |",
            flush=True,
        )


def main() -> None:
    """Print where it ran, then one table per size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["demo", "middle"])
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=DIVERGENCES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-naive", action="store_true", help="skip the full-logits form")
    args = parser.parse_args()
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
