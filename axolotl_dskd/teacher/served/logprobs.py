"""How vLLM is asked for log-probabilities, and what its answer must look like to be used.

POST /v1/completions with token ids and `prompt_logprobs`; one token is written, and not looked at.
Of each position the answer names the token that stands there and, where they are asked for, the
likeliest ones: some 75 bytes of JSON a token that is named, prompts included.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.served.launch import HINT
from axolotl_dskd.types import Logprobs

PATH = "/v1/completions"
#: Bytes of a token that is named, at most: its text is there, too.
_NAMED = 320
#: What vLLM writes for a probability of 0.
_ZERO = -9999.0
#: Log-probabilities are at most 0, and their probabilities add up to at most 1, but for rounding.
ROUNDING = 1e-3


class _Useless(Exception):
    """What an answer is, in words that follow "log-probabilities"."""


@dataclass(frozen=True)
class Question:
    """What is asked about every text.

    Attributes:
        model: the name by which the servers know the teacher.
        top_k: how many of the likeliest tokens; 0: the labels alone.
        vocab_size: ids that the teacher's tokenizer can emit; rows of its head beyond are padding.
    """

    model: str
    top_k: int
    vocab_size: int


async def ask_for_logprobs(
    servers: Servers,
    question: Question,
    ids: list[int],
    positions: Tensor,
    *,
    url: str | None = None,
) -> Logprobs:
    """Log-probabilities of some tokens of a text, at temperature 1.

    Args:
        servers: who is asked.
        question: what about.
        ids: the text's tokens.
        positions: [m] of those that predict a label, which is the token behind each.
        url: ask this server and no other.

    Raises:
        ValueError: no server answers, or an answer is not what was asked for.
    """
    body = {
        "model": question.model,
        "prompt": ids,
        "prompt_logprobs": question.top_k,
        "max_tokens": 1,
        # Not left to the server's defaults, which may be those that the model is chatted with.
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    limit = (1 << 16) + len(ids) * (question.top_k + 1) * _NAMED
    answer = await servers.ask("POST", PATH, body, limit=limit, url=url)
    wanted = [p + 1 for p in positions.tolist()]
    try:
        (choice,) = json.loads(answer.content)["choices"]
        entries = choice["prompt_logprobs"]
        if len(entries) != len(ids):
            raise _Useless(f"of {len(entries)} positions, not of {len(ids)}")
        rows = [_row(entries[at], ids[at], question) for at in wanted]
    except _Useless as what:
        raise ValueError(f"{answer.url}{PATH} gives log-probabilities {what}. {HINT}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        kind = answer.headers.get("content-type")
        raise ValueError(
            f"{answer.url}{PATH} gives no log-probabilities ({kind}): is it vLLM? {HINT}"
        ) from None
    labels = torch.tensor([label for label, *_ in rows], dtype=torch.float32)
    if not question.top_k:
        return Logprobs(labels)
    places = torch.tensor([named for _, named, _ in rows], dtype=torch.long)
    top = torch.tensor([numbers for *_, numbers in rows], dtype=torch.float32)
    shape = len(rows), question.top_k
    return Logprobs(labels, places.view(shape), top.view(shape))


def _row(
    entry: dict[str, Any], label: int, question: Question
) -> tuple[float, list[int], list[float]]:
    """The label's log-probability at a position; the likeliest tokens, and theirs.

    Raises:
        _Useless: the entry is not what was asked for; or what Python raises where it is no entry.
    """
    said = {int(token): float(value["logprob"]) for token, value in entry.items()}
    if label not in said:
        raise _Useless(f"of other tokens than those that were sent (not of {label})")
    if not all(math.isfinite(x) and x <= ROUNDING for x in said.values()):
        raise _Useless(
            f"that are none: {max(said.values()):g} at a token {label}. Start it with "
            "--logprobs-mode raw_logprobs; if it has that, its weights are damaged"
        )
    if said[label] <= _ZERO:
        raise _Useless(f"of 0 as the probability of a token that is there ({label})")
    k = question.top_k
    if not k:
        return said[label], [], []
    if len(said) < k:
        raise _Useless(f"of {len(said)} tokens at a position, not of {k}")
    likeliest = sorted(said, key=lambda token: -said[token])[:k]
    if sum(math.exp(said[token]) for token in likeliest) > 1 + ROUNDING:
        raise _Useless(
            f"whose probabilities add up to more than 1 at a token {label}. Start it with "
            "--logprobs-mode raw_logprobs"
        )
    named = [t for t in likeliest if 0 <= t < question.vocab_size and said[t] > _ZERO]
    missing = k - len(named)
    numbers = [said[token] for token in named]
    return said[label], named + [-1] * missing, numbers + [-math.inf] * missing
