"""How vLLM is asked for final hidden states, and what its answer must look like to be used.

POST /pooling with token ids; the body of the answer is raw numbers, a header says their shape.
Nothing of it is unpickled.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.servers import Answer, Servers
from axolotl_dskd.teacher.served.launch import HINT

PATH = "/pooling"


async def ask_for_states(
    servers: Servers,
    model: str,
    ids: list[int],
    *,
    width: int,
    dtype: torch.dtype,
    url: str | None = None,
) -> Tensor:
    """Final hidden states [len(ids), width] of a text, as the head takes them.

    Args:
        servers: who is asked.
        model: the name by which they know the teacher.
        ids: the text's tokens.
        width: of a state.
        dtype: float32, bfloat16 or float16: of the answer.
        url: ask this server and no other.

    Raises:
        ValueError: no server answers, or an answer is not what was asked for.
    """
    name = str(dtype).removeprefix("torch.")
    body = {
        "model": model,
        "input": [ids],
        "task": "token_embed",
        "use_activation": False,
        "encoding_format": "bytes",
        "embed_dtype": name,
        "endianness": "little",
    }
    size = len(ids) * width * dtype.itemsize
    # An error in words may be longer than two states.
    answer = await servers.ask("POST", PATH, body, limit=max(size, 1 << 16), url=url)
    _check(answer, [len(ids), width], name, size)
    states = torch.frombuffer(bytearray(answer.content), dtype=dtype).view(len(ids), width)
    if not bool(torch.isfinite(states).all()):
        raise ValueError(
            f"{answer.url} gives states that are not finite for the text whose ids begin with "
            f"{ids[:12]}. Its weights are damaged, or its dtype is too narrow: start it with "
            "--dtype bfloat16 or float32."
        )
    return states


def _check(answer: Answer, shape: list[int], dtype: str, size: int) -> None:
    """Refuse an answer that is not these numbers.

    Raises:
        ValueError: with what was found.
    """
    wanted = f"{dtype} numbers of shape {shape}"
    found: Any = answer.headers.get("metadata")
    if found is None:
        kind = answer.headers.get("content-type")
        raise ValueError(
            f"{answer.url}{PATH} answers with {kind}, not with {wanted}: it is no vLLM pooling "
            f"server. {HINT}"
        )
    try:
        (entry,) = json.loads(found)["data"]
        said = entry["shape"], entry["embed_dtype"], entry["endianness"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{answer.url}{PATH} describes its answer as {found[:200]!r}.") from None
    if said != (shape, dtype, "little"):
        raise ValueError(
            f"{answer.url}{PATH} answers with {said[1]} numbers of shape {said[0]}, not with "
            f"{wanted}: it serves another model, or not every token's final state. {HINT}"
        )
    if len(answer.content) != size:
        raise ValueError(
            f"{answer.url}{PATH} announces {wanted}, {size:,} bytes, and gives "
            f"{len(answer.content):,}. Something between it and here changes answers."
        )
