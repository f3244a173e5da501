"""Small real parts for tests: tokenizers of both families, models, rows, and Axolotl runs.

Everything is made in-process from fixed seeds; nothing is downloaded.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A café in Zürich serves naïve tourists über-expensive crêpes every day.",
    "def add(a, b):\n\treturn a + b  # tabs and\n\n    spaces",
    "你好,世界。日本語のテキストです。한국어도 있습니다.",
    "Emoji 😀👩‍👩‍👧 and math ∑ x² ≤ ∞; עברית and العربية run from the right.",
    "Water boils at one hundred degrees because its molecules move fast enough.",
    "Name three things that float: wood, ice and a small paper boat.",
    "### Instruction: ### Response: Below is an instruction that describes a task.",
] * 4

QUESTIONS = [
    ("Why is the sky blue?", "Because air scatters blue light more than red light."),
    ("Name a fruit.", "An apple is a fruit."),
    ("Say hello in Spanish.", "Hola, ¿qué tal?"),
    ("Add two and three.", "Two plus three is five."),
    ("What floats?", "Wood, ice and a small paper boat float on water."),
    ("Write a function.", "def add(a, b):\n\treturn a + b"),
    ("Greet me in Chinese.", "你好,世界。"),
    ("Smile!", "Sure: 😀👩‍👩‍👧"),
]

STUDENT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEACHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '[' + m['role'] + ']\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


@lru_cache(maxsize=8)
def byte_level_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A GPT-2-like byte-level BPE with turns `<|user|> … <|assistant|> … <|end|>`, no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = STUDENT_TEMPLATE
    return tokenizer


@lru_cache(maxsize=8)
def sentencepiece_tokenizer(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A Llama-2-like BPE with `▁`, a dummy prefix, byte fallback and a BOS."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
    )
    # Other characters are left to byte fallback. (The trainer's own limit_alphabet picks among
    # equally rare ones at random.)
    known = ("".join(c for c in text if ord(c) < 0x100) for text in CORPUS)
    backend.train_from_iterator(known, trainer)
    # Byte tokens are ordinary tokens of the model, not added ones.
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEACHER_TEMPLATE
    return tokenizer


def tiny_llama(vocab_size: int, hidden: int, seed: int, **overrides: Any) -> LlamaForCausalLM:
    """Two layers, four heads, random weights of ordinary size."""
    torch.manual_seed(seed)
    sizes = {
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=hidden, **{**sizes, **overrides})
    return LlamaForCausalLM(config).eval()


def save_pair(
    folder: Path, same_vocabulary: bool = False, hidden_sizes: tuple[int, int] = (32, 48)
) -> tuple[Path, Path]:
    """Student and teacher as folders with weights and tokenizer, as users have them."""
    student, teacher = folder / "student", folder / "teacher"
    ours = byte_level_tokenizer()
    theirs = ours if same_vocabulary else sentencepiece_tokenizer()
    sides = ((student, ours), (teacher, theirs))
    for seed, ((path, tokenizer), hidden) in enumerate(zip(sides, hidden_sizes, strict=True)):
        model = tiny_llama(len(tokenizer), hidden, seed)
        model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return student, teacher


def chat_rows(count: int = 16) -> list[dict[str, Any]]:
    """Short conversations, the later ones with several turns."""
    rows = []
    for i in range(count):
        turns = [QUESTIONS[i % len(QUESTIONS)]]
        if i % 3 == 2:
            turns.append(QUESTIONS[(i * 5 + 1) % len(QUESTIONS)])
        rows.append(
            {
                "messages": [
                    {"role": role, "content": text}
                    for question, answer in turns
                    for role, text in (("user", f"{question} ({i})"), ("assistant", answer))
                ]
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def save_mixture_of_experts(folder: Path, router_weight: float) -> None:
    """In place of a student: a tiny Qwen3 with experts, whose router's loss has a weight."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=router_weight,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_config(folder: Path, **overrides: Any) -> dict[str, Any]:
    """A complete CPU training config; `dskd=None` makes it plain SFT. Needs `save_pair`."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, chat_rows())
    config: dict[str, Any] = {
        "base_model": str(folder / "student"),
        "plugins": ["axolotl_dskd.DSKDPlugin"],
        "dskd": {"teacher": {"base_model": str(folder / "teacher")}},
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / "out"),
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        # Axolotl's default starts processes that take three times as long as such a training.
        "dataloader_num_workers": 0,
        "max_steps": 4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 1e-3,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "weight_decay": 0.0,
        "pad_to_sequence_len": False,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "shuffle_merged_datasets": False,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not None}
