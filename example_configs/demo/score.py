"""Score a model folder on held-out answers: bits per byte and next-token agreement."""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 8


def answer_span(tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Token ids of a conversation up to its end token, and where its last answer begins."""
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    # Where the two part is the answer's first token, even if a token straddles the boundary.
    start = 0
    while start < min(len(prompt), len(ids)) and prompt[start] == ids[start]:
        start += 1
    # Some templates write a line break after the end token; it is no part of the answer.
    ends = [place for place in range(start, len(ids)) if ids[place] == tokenizer.eos_token_id]
    if not ends:
        raise ValueError("the chat template does not close the answer with the end token")
    return ids[: ends[-1] + 1], start


@torch.inference_mode()
def score(model_dir: str | Path, heldout_jsonl: str | Path) -> dict[str, float]:
    """Bits per byte of the answers (end token included) and share of tokens ranked first.

    Bits are divided by the UTF-8 bytes of the answers, so that models with different tokenizers
    can be compared. Agreement counts tokens, which only models with one tokenizer share.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    lines = Path(heldout_jsonl).read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    spans = sorted((answer_span(tokenizer, chat) for chat in chats), key=lambda span: len(span[0]))

    nats, hits, tokens = 0.0, 0, 0
    for first in range(0, len(spans), BATCH_SIZE):
        batch = spans[first : first + BATCH_SIZE]
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention = torch.zeros(len(batch), width, dtype=torch.long)
        counted = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, (ids, start) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention[row, : len(ids)] = 1
            counted[row, start : len(ids)] = True
        logits = model(input_ids=input_ids, attention_mask=attention, use_cache=False).logits
        scored = logits[:, :-1][counted[:, 1:]]
        targets = input_ids[:, 1:][counted[:, 1:]]
        nats += torch.nn.functional.cross_entropy(scored, targets, reduction="sum").item()
        hits += int((scored.argmax(dim=-1) == targets).sum())
        tokens += len(targets)
    answer_bytes = sum(len(chat[-1]["content"].encode("utf-8")) for chat in chats)
    return {
        "bits_per_byte": nats / math.log(2) / answer_bytes,
        "agreement": hits / tokens,
        "answers": len(chats),
        "answer_tokens": tokens,
        "answer_bytes": answer_bytes,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a causal language model with its tokenizer")
    parser.add_argument("--heldout", default=Path(__file__).resolve().parent / "heldout.jsonl")
    args = parser.parse_args()
    print(json.dumps(score(args.model, args.heldout), indent=2))
