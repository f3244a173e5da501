"""Tokenizers of any size without training: for benchmarks at vocabularies of ordinary size."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@cache
def numbered_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level one of so many tokens, half of which begin with a space. The tokens of a smaller
    one are a larger one's, too."""
    numbers = (f"Ġ{i}" if i % 2 else f"{i}" for i in range(size))
    tokens = dict.fromkeys(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *numbers])
    vocabulary = {token: i for i, token in enumerate(list(tokens)[:size])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
