"""The memory plan against PyTorch's own count on a CUDA device. Run by hand: `pytest -m gpu`.

Sizes are such that weights, activations and logits each matter, and nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.measured_memory import measure

pytestmark = pytest.mark.gpu

ADAPTER = {"adapter": "lora", "lora_r": 16, "lora_alpha": 16, "lora_target_linear": True}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full-checkpointed": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "lora": ADAPTER,
    "qlora": {**ADAPTER, "adapter": "qlora", "load_in_4bit": True, "gradient_checkpointing": True},
}


def save_model(path: Path, tokenizer: Any, rows: int, hidden: int, layers: int) -> None:
    """A random Llama whose head has more rows than its tokenizer has ids."""
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_15_percent_of_what_cuda_held(tmp_path: Path, case: str):
    save_model(tmp_path / "student", tiny.byte_level_tokenizer(), 32000, 1024, 16)
    save_model(tmp_path / "teacher", tiny.sentencepiece_tokenizer(), 64000, 2048, 16)
    rows = tiny.chat_rows(64)
    for row in rows:
        row["messages"][-1]["content"] = " ".join([row["messages"][-1]["content"]] * 12)
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    config = tiny.base_config(
        tmp_path,
        bf16=True,
        sequence_len=1024,
        micro_batch_size=8,
        max_steps=4,
        optimizer="adamw_torch_fused",
        **CASES[case],
    )
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    found = measure(tmp_path / "config.yml", gpu=True)
    # PyTorch counts neither the context nor what its allocator keeps in pieces.
    allowances = sum(found["at_peak"].get(k, 0) for k in ("CUDA context", "fragmentation"))
    assert found["plan"] - allowances == pytest.approx(found["measured"], rel=0.15), found
