"""What an on-policy step costs, and where its time goes, beside TRL's GOLD trainer.

The same student, teacher, rows, batch and answer length; tokenizers that share no ids. Everybody
answers all prompts of every step (`share: 1`, `lmbda: 1`) and trains the whole student in float32.
Of each step: writing, the teacher's forward, learning (the student's forward, loss, backward and
optimizer), and the rest, which nobody would miss. Each trainer is a process of its own, and they
take turns: a step of each, round by round; ratios are taken within a round. Times are the clock's:
run it on a machine that does nothing else.

The student has learned the rows for some steps, so that it writes text; the teacher's weights are
random, which changes no cost. Answers of the data are longer than what is written, so that what is
written ends by itself as good as never and all rows are of one length.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_rollouts.py           # about five minutes
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_rollouts.py --vllm    # and vLLM (`make vllm`)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import platform
import pydoc
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import tests.support.on_cpu  # noqa: F401

# isort: split
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from tests.support import tiny
from tests.support.vllm import MISSING, PYTHON, VLLM

#: Where the time of a step goes; "rest" is what is in none of the others.
PARTS = ("writing", "teacher", "learning", "rest")
TRL, OURS = "TRL GOLD (lmbda: 1)", "gold"
LENGTH = 384
PROMPT_WORDS, ANSWER_WORDS = 40, 70


# ---- the pair and its rows -----------------------------------------------------------------------


def tokenizer(like: PreTrainedTokenizerFast, texts: list[str], size: int) -> Any:
    """A byte-level BPE of some texts with the special tokens and the template of another one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = sorted({"<|pad|>", "<|end|>", "<s>", "</s>", "<|user|>", "<|assistant|>"})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=specials,
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    end, pad = ("<|end|>", "<|pad|>") if like.bos_token is None else ("</s>", "</s>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=pad, bos_token=like.bos_token
    )
    made.chat_template = like.chat_template
    return made


def prepare(folder: Path, rows: int) -> None:
    """Student, teacher and rows, as users have them."""
    texts = [pydoc.plain(topics[name]) for name in sorted(topics)]
    words = re.split(r"(?<=\s)(?=\S)", "".join(texts))
    each = PROMPT_WORDS + ANSWER_WORDS
    turns = [("user", slice(0, PROMPT_WORDS)), ("assistant", slice(PROMPT_WORDS, each))]
    conversations = [
        {
            "messages": [
                {"role": role, "content": "".join(words[at : at + each][part]).strip()}
                for role, part in turns
            ]
        }
        for at in range(0, rows * each, each)
    ]
    tiny.write_rows(folder / "rows.jsonl", conversations)
    half = len(texts) // 2
    sides = (
        ("student", tiny.byte_level_tokenizer(), texts[:half], 8_000, 256, 4),
        ("teacher", tiny.sentencepiece_tokenizer(), texts[half:], 12_000, 384, 6),
    )
    for seed, (name, like, read, size, hidden, layers) in enumerate(sides):
        made = tokenizer(like, read, size)
        made.save_pretrained(folder / name)
        model = tiny.tiny_llama(
            len(made),
            hidden,
            seed,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            initializer_range=0.02,
        )
        model.config.eos_token_id = model.generation_config.eos_token_id = made.eos_token_id
        model.save_pretrained(folder / name)
    teach(folder / "student", conversations[:4])


def teach(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Let the student learn to write: what is no text would be written again by nobody."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    own = AutoTokenizer.from_pretrained(folder)
    texts = [own.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    batch = own(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


# ---- the trainers --------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Lets a training go on a step at a time, and says how long each step and its parts took."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.spent: Counter[str] = Counter()
        self.within: list[float] = []
        self.tokens = 0
        self.began = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Its time, without that of the parts within it."""
        began = time.perf_counter()
        self.within.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.spent[name] += took - self.within.pop()
            if self.within:
                self.within[-1] += took

    def of(self, name: str, where: Any, attribute: str, note: Any = None) -> Any:
        """A patch by which calls of a function are a part; `note` is told what it returns."""
        original = getattr(where, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                found = original(*args, **kwargs)
            if note is not None:
                note(found)
            return found

        return mock.patch.object(where, attribute, watched)

    def wait(self) -> None:
        """For one's turn."""
        self.pipe.recv()
        self.spent.clear()
        self.tokens = 0
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pipe.send("ready")
        self.wait()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizing = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent["learning"] += time.perf_counter() - self.optimizing

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = time.perf_counter() - self.began
        rest = took - sum(self.spent.values())
        self.pipe.send({**self.spent, "rest": rest, "step": took, "tokens": self.tokens})
        if state.global_step < state.max_steps:
            self.wait()


def ours(folder: Path, args: argparse.Namespace, block: dict[str, Any], pipe: Connection) -> None:
    """`axolotl train`."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from axolotl.utils.dict import DictDefault

    from axolotl_dskd.generation import TransformersWriter, VLLMWriter
    from axolotl_dskd.teacher.live import LiveTeacher
    from axolotl_dskd.training.trainer import DSKDTrainer

    watch, begin = Watch(pipe), DSKDTrainer.train
    samples = {"from": "student", "share": 1.0, "max_new_tokens": args.new_tokens}
    samples["engine"] = block.pop("engine", "transformers")
    config = tiny.base_config(
        folder,
        dskd={
            "teacher": {"base_model": str(folder / "teacher"), "dtype": "float32"},
            "samples": samples,
            **block,
        },
        micro_batch_size=args.rows,
        max_steps=args.rounds,
        sequence_len=LENGTH,
        learning_rate=1e-6,
        num_epochs=100,
        dataloader_num_workers=0,
        output_dir=tempfile.mkdtemp(dir=folder),
    )

    def trained(self: Any, *more: Any, **keys: Any) -> Any:
        self.add_callback(watch)
        return begin(self, *more, **keys)

    def count(answers: list[Any]) -> None:
        watch.tokens += sum(len(answer.ids) for answer in answers)

    with (
        mock.patch.object(DSKDTrainer, "train", trained),
        watch.of("writing", TransformersWriter, "write", count),
        watch.of("writing", VLLMWriter, "write", count),
        watch.of("teacher", LiveTeacher, "states"),
        watch.of("learning", DSKDTrainer, "training_step"),
    ):
        cfg = load_cfg(DictDefault(config))
        train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))


def gold(folder: Path, args: argparse.Namespace, _block: dict[str, Any], pipe: Connection) -> None:
    """TRL's trainer on the same."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    watch = Watch(pipe)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        train_dataset=Dataset.from_json(str(folder / "rows.jsonl")),
        callbacks=[watch],
        args=GOLDConfig(
            output_dir=tempfile.mkdtemp(dir=folder),
            lmbda=1.0,
            use_uld_loss=True,
            uld_use_hybrid_loss=True,
            teacher_tokenizer_name_or_path=str(folder / "teacher"),
            max_completion_length=args.new_tokens,
            max_length=LENGTH,
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 0},
            per_device_train_batch_size=args.rows,
            max_steps=args.rounds,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
        ),
    )

    def count(found: Any) -> None:
        watch.tokens += int((found[2] != -100).sum())

    def forward(module: Any, *inputs: Any, **keys: Any) -> Any:
        with watch.part("teacher"):
            return type(module).forward(module, *inputs, **keys)

    trainer.teacher_model.forward = forward.__get__(trainer.teacher_model)
    with (
        watch.of("writing", GOLDTrainer, "generate_on_policy_outputs", count),
        watch.of("learning", GOLDTrainer, "training_step"),
    ):
        trainer.train()


# ---- turns ---------------------------------------------------------------------------------------


def quietly(work: Callable[..., None], log: Path, *args: Any) -> None:
    """In a new process, whose output goes to a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(target, number)
    work(*args)


def in_turns(folder: Path, args: argparse.Namespace, runs: dict[str, Any]) -> dict[str, Any]:
    """Train all of them, a step of each per round; of each, its steps but for the first one."""
    context = multiprocessing.get_context("fork")
    pipes: dict[str, Connection] = {}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    processes = []
    for name, (work, block) in runs.items():
        pipes[name], theirs = context.Pipe()
        log = folder / f"{len(processes)}.log"
        process = context.Process(target=quietly, args=(work, log, folder, args, block, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        try:
            assert pipes[name].recv() == "ready"
        except EOFError:
            raise SystemExit(f"{name} does not begin:\n{log.read_text()[-3000:]}") from None
    for number in range(args.rounds):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            pipes[name].send("go")
            steps[name].append(pipes[name].recv())
    for process in processes:
        process.join()
    return {name: found[1:] for name, found in steps.items()}


def show(console: Console, steps: dict[str, list[dict[str, float]]], rows: int) -> None:
    """One table; ratios are medians over rounds."""

    def middle(values: Any) -> float:
        return statistics.median(values)

    table = Table()
    for head in ("trainer", "rows/s", "tokens a row", *PARTS, "step / TRL", "beside writing / TRL"):
        table.add_column(head, justify="left" if head == "trainer" else "right")
    for name, own in steps.items():
        ratios = []
        for part in ("step", "writing"):
            values = [
                (step["step"] - (step["writing"] if part == "writing" else 0))
                / (other["step"] - (other["writing"] if part == "writing" else 0))
                for step, other in zip(own, steps[TRL], strict=True)
            ]
            ratios.append(f"{middle(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        table.add_row(
            name,
            f"{middle(rows / step['step'] for step in own):.2f}",
            f"{middle(step['tokens'] / rows for step in own):.1f}",
            *(f"{middle(step.get(p, 0.0) / step['step'] for step in own):.1%}" for p in PARTS),
            *ratios,
        )
    console.print(table)


def main() -> None:
    """Print where it ran and one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7, help="the first one is not counted")
    parser.add_argument("--vllm", action="store_true", help="also let a vLLM write")
    args = parser.parse_args()
    if args.vllm and not PYTHON.exists():
        raise SystemExit(MISSING)
    for name in ("axolotl.train", "trl.experimental.gold"):  # once, for all that are forked
        importlib.import_module(name)

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        prepare(folder, 4 * args.rows)
        runs: dict[str, Any] = {
            TRL: (gold, {}),
            OURS: (ours, {"objective": "gold"}),
            "dual_space": (ours, {"objective": "dual_space"}),
        }
        if args.vllm:
            server = VLLM.that_writes(folder / "student", folder)
            stack.callback(server.stop)
            server.start()
            engine = {"vllm": {"url": server.url, "model": "student"}}
            runs["gold, vLLM writes"] = (ours, {"objective": "gold", "engine": engine})
        steps = in_turns(folder, args, runs)
    console = Console(width=160)
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads; {args.rows} rows a step, {args.new_tokens} new "
        f"tokens; shares of a step's time, medians of {args.rounds - 1} rounds (least-most)"
    )
    show(console, steps, args.rows)


if __name__ == "__main__":
    main()
