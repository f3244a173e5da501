"""Let the teacher answer prompts.txt and write train.jsonl and heldout.jsonl for the demo.

The two files are part of the repository; run this again only to change the prompts.
"""

import argparse
import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch
from teacher import export_teacher
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
HELDOUT_ROWS = 64
MIN_TRAIN_ROWS = 400
BATCH_SIZE = 32
MAX_NEW_TOKENS = 64


def read_prompts(path: Path) -> list[str]:
    """The prompts, one per line; a repeated prompt is an error."""
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if len(prompts) != len(set(prompts)):
        raise SystemExit(f"{path} has the same prompt twice")
    return prompts


def is_clean(text: str) -> bool:
    """True for text without undecodable bytes, control characters or leaked special tokens."""
    if not text or "\ufffd" in text or "<|" in text:
        return False
    return all(char == "\n" or unicodedata.category(char) != "Cc" for char in text)


@torch.inference_mode()
def answers(model, tokenizer, prompts: list[str]) -> Iterator[tuple[str, str | None]]:
    """Sample one answer per prompt; None where the answer was cut, empty or not clean."""
    # Similar lengths go together, so that little of a batch is padding.
    ordered = sorted(prompts, key=lambda prompt: (len(prompt), prompt))
    for start in tqdm(range(0, len(ordered), BATCH_SIZE), desc="batches of answers"):
        batch = ordered[start : start + BATCH_SIZE]
        chats = [[{"role": "user", "content": prompt}] for prompt in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
        )
        for prompt, row in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
            tokens = row.tolist()
            if tokenizer.eos_token_id not in tokens:
                yield prompt, None
                continue
            kept = tokens[: tokens.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(kept).strip()
            yield prompt, text if is_clean(text) else None


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write one conversation per line."""
    with path.open("w", encoding="utf-8") as file:
        for prompt, answer in rows:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_data(teacher_dir: str | Path, prompts_file: Path, out_dir: Path, seed: int) -> None:
    """Generate, filter, split by seed and write; print what was kept."""
    prompts = read_prompts(prompts_file)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    answered = dict(answers(model, tokenizer, prompts))
    rows = [(prompt, answered[prompt]) for prompt in prompts if answered[prompt] is not None]
    random.Random(seed).shuffle(rows)
    heldout, train = rows[:HELDOUT_ROWS], rows[HELDOUT_ROWS:]
    if len(train) < MIN_TRAIN_ROWS:
        raise SystemExit(f"only {len(train)} training rows are left; add or shorten prompts")
    write_rows(out_dir / "train.jsonl", train)
    write_rows(out_dir / "heldout.jsonl", heldout)
    lengths = [len(tokenizer(answer)["input_ids"]) + 1 for _, answer in rows]
    print(
        f"{len(prompts)} prompts, {len(rows)} kept: {len(train)} train, {len(heldout)} held out; "
        f"mean answer {sum(lengths) / len(lengths):.1f} tokens with the end token"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="outputs/demo/teacher", help="folder of the teacher")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.txt")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    make_data(export_teacher(args.teacher), args.prompts, args.out, args.seed)
