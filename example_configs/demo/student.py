"""Build the demo's student: a few of the teacher's layers under a small tokenizer of its own."""

import argparse
import copy
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
# What the student's special tokens are called by the teacher, for their first embeddings.
SPECIAL_AS_TEACHER = {
    USER: "<|im_start|>user\n",
    ASSISTANT: "<|im_start|>assistant\n",
    END: "<|im_end|>",
    PAD: "<|endoftext|>",
}
# On purpose unlike the teacher's template: no system turn, no line breaks, no BOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{{ message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(train_jsonl: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the contents of the training conversations."""
    texts = []
    for line in train_jsonl.read_text(encoding="utf-8").splitlines():
        texts += [message["content"] for message in json.loads(line)["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_AS_TEACHER),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def teacher_ids(token: str, teacher_tokenizer) -> list[int]:
    """The teacher's tokens for the bytes of one student token."""
    text = SPECIAL_AS_TEACHER.get(token)
    if text is None:
        text = decoders.ByteLevel().decode([token])
        if "\ufffd" in text:
            # Part of a character: both vocabularies write a byte as the same letter.
            vocabulary = teacher_tokenizer.get_vocab()
            return [vocabulary[letter] for letter in token if letter in vocabulary]
    return teacher_tokenizer(text, add_special_tokens=False)["input_ids"]


def first_embeddings(tokenizer, teacher_tokenizer, table: torch.Tensor) -> torch.Tensor:
    """One row per student token: the mean of the teacher's rows for the same bytes."""
    rows = []
    for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        ids = teacher_ids(token, teacher_tokenizer)
        rows.append(table[ids].mean(dim=0) if ids else table.mean(dim=0))
    return torch.stack(rows)


def spaced_layers(total: int, wanted: int) -> list[int]:
    """Evenly spaced layer numbers with the first and the last among them."""
    if not 2 <= wanted <= total:
        raise ValueError(f"layers must be between 2 and {total}, not {wanted}")
    return [round(place * (total - 1) / (wanted - 1)) for place in range(wanted)]


def build_student(
    teacher_dir: str | Path,
    train_jsonl: str | Path,
    out_dir: str | Path,
    seed: int,
    layers: int = 4,
    vocab_size: int = 3000,
) -> Path:
    """Write the student's folder; the same arguments give the same weights."""
    torch.manual_seed(seed)
    out = Path(out_dir)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    teacher_tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    tokenizer = train_tokenizer(Path(train_jsonl), vocab_size)

    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    config.vocab_size = len(tokenizer)
    config.bos_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.unk_token_id = None
    config.tie_word_embeddings = True
    student = LlamaForCausalLM(config)
    with torch.no_grad():
        table = teacher.get_input_embeddings().weight
        student.get_input_embeddings().weight.copy_(
            first_embeddings(tokenizer, teacher_tokenizer, table)
        )
        for place, source in enumerate(spaced_layers(teacher.config.num_hidden_layers, layers)):
            student.model.layers[place].load_state_dict(teacher.model.layers[source].state_dict())
        student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    student.tie_weights()
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="outputs/demo/teacher", help="folder of the teacher")
    parser.add_argument("--train", default=Path(__file__).resolve().parent / "train.jsonl")
    parser.add_argument("--out", default="outputs/demo/student", help="folder to write")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    print(build_student(args.teacher, args.train, args.out, args.seed))
