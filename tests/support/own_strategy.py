"""A prompt strategy of one's own, as a YAML names it: `type: tests.support.own_strategy`."""

from __future__ import annotations

from typing import Any

from axolotl.prompt_tokenizers import PromptTokenizingStrategy


class Telegram(PromptTokenizingStrategy):
    """`question STOP` unsupervised, then the answer. Changes the row it is given, as some do."""

    def tokenize_prompt(self, prompt: dict[str, Any]) -> dict[str, list[int]]:
        question = self.tokenizer(prompt.pop("question") + " STOP ")["input_ids"]
        answer = self.tokenizer(prompt.pop("answer"), add_special_tokens=False)["input_ids"]
        answer.append(self.tokenizer.eos_token_id)
        ids = question + answer
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * len(question) + answer,
        }


def load(tokenizer: Any, cfg: Any) -> Telegram:
    """Axolotl's entry point."""
    return Telegram(None, tokenizer, cfg.train_on_inputs, cfg.sequence_len)
