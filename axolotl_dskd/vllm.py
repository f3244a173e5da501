"""What a vLLM says of itself, against what is expected of it: its models, how long they read, how
they spell text. Knows requests and ids; not what the model is for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from axolotl_dskd.servers import Servers

TEXT = (
    "Water boils at one hundred degrees because its molecules then move fast enough to leave. "
    "Ünïcode, too: 你好. def add(a, b):\n    return a + b\n"
)


def models(servers: Servers, url: str) -> dict[str, int | None]:
    """The models that a server knows now, adapters included, and how many tokens they read.

    Raises:
        ValueError: it does not answer, or is no vLLM.
    """
    answer = servers.start(servers.ask("GET", "/v1/models", url=url)).result()
    try:
        return {m["id"]: m.get("max_model_len") for m in json.loads(answer.content)["data"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{url}/v1/models gives no list of models: is it vLLM? {servers.hint}"
        ) from None


def check_model(
    servers: Servers, url: str, name: str, longest: int, shorter: str, *, behind: int = 0
) -> None:
    """The server knows the model and reads texts that are long enough.

    Args:
        servers: who is asked.
        url: of them.
        name: of the model.
        longest: tokens of the longest row.
        shorter: the key that makes rows shorter.
        behind: tokens that the server writes behind a row.

    Raises:
        ValueError: it does not.
    """
    known = models(servers, url)
    if name not in known:
        raise ValueError(
            f"{url} serves {', '.join(sorted(known))}, not {name}. If that is the model, set "
            f"`model` beside the server's url to its name there. {servers.hint}"
        )
    limit = known[name]
    if limit is not None and limit < longest + behind:
        raise ValueError(
            f"{url} reads {limit} tokens at most, and the longest row has {longest}. Start it with "
            f"--max-model-len {longest + behind}, or set {shorter}: {limit - behind}."
        )


def check_tokenizer(servers: Servers, url: str, name: str, ids: Sequence[int]) -> None:
    """The server's tokenizer gives the ids of `TEXT` that ours gives.

    Args:
        servers: who is asked.
        url: of them.
        name: of the model.
        ids: of `TEXT`, without special tokens.

    Raises:
        ValueError: it gives others.
    """
    body = {"model": name, "prompt": TEXT, "add_special_tokens": False}
    answer = servers.start(servers.ask("POST", "/tokenize", body, url=url)).result()
    try:
        theirs = json.loads(answer.content)["tokens"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{url}/tokenize gives no tokens: is it vLLM? {servers.hint}") from None
    if theirs != list(ids):
        raise ValueError(
            f"{url} has another tokenizer than {name} has here: it reads {TEXT[:20]!r}… as "
            f"{theirs[:8]}…, not as {list(ids[:8])}…. Serve the model that base_model names."
        )
