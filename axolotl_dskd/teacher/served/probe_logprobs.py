"""Try what servers give as log-probabilities, before training trusts them."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from transformers import AutoConfig

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.servers import Refused, Servers
from axolotl_dskd.teacher.served.launch import HINT
from axolotl_dskd.teacher.served.logprobs import ROUNDING, Question, ask_for_logprobs
from axolotl_dskd.teacher.served.probe import PART, READ, Probe, report_surprise
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun
from axolotl_dskd.types import Logprobs

LOG = get_logger(__name__)

#: Nats between log-probabilities of labels, the median over tokens. Below: rounding, 4-bit weights
#: included. Above: another model, or another temperature.
_OTHER_MODEL = 0.5


def probe_logprobs(
    servers: Servers, spec: TeacherSpec, question: Question, run: TrainingRun
) -> None:
    """Try every server.

    Args:
        servers: who is tried.
        spec: the teacher that they should serve.
        question: what training will ask.
        run: whose rows will be asked about; the longest must fit, and the token that is written.
            Its first process compares with local weights, too.

    Raises:
        ValueError: a server does not answer, or serves something else.
    """
    probe = Probe(servers, spec, run)
    ids = probe.ids[:READ]
    given: list[Tensor] = []
    for url in servers.config.addresses:
        probe.check(url, probe.longest + 1)
        whole, part = (_ask(servers, question, read, url) for read in (ids, ids[:PART]))
        _check_sums(url, whole, spec.config)
        difference = _difference(whole.labels[: len(part.labels)], part.labels)
        if difference > _OTHER_MODEL:
            raise ValueError(
                f"{url} gives other log-probabilities for the beginning of a text once the text "
                f"goes on (by {difference:.1f} nats): it does not read causally. {HINT}"
            )
        if given and (difference := _difference(given[0], whole.labels)) > _OTHER_MODEL:
            raise ValueError(
                f"{servers.config.addresses[0]} and {url} give log-probabilities that differ by "
                f"{difference:.1f} nats: they do not serve the same teacher."
            )
        given.append(whole.labels)
    report_surprise(-float(given[0].mean()), spec.vocab_size)
    if run.rank == 0 and (model := probe.local_model()) is not None:
        _compare(given[0], ids, model, spec.config.base_model)


def _ask(servers: Servers, question: Question, ids: list[int], url: str) -> Logprobs:
    positions = torch.arange(len(ids) - 1)
    try:
        return servers.start(ask_for_logprobs(servers, question, ids, positions, url=url)).result()
    except Refused as refused:
        flag = f" with --max-logprobs {question.top_k} and" if question.top_k else ""
        raise ValueError(
            f"{refused}\nIt has to be started{flag} without --runner pooling. {HINT}"
        ) from None


def _check_sums(url: str, said: Logprobs, config: TeacherConfig) -> None:
    """No token that is not named is likelier than the last that is, so that these and all others
    have a probability of 1 between them, whatever the model says; logits have not.

    Raises:
        ValueError: they have less.
    """
    if said.top is None:
        return
    described = AutoConfig.from_pretrained(
        config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    others = described.get_text_config().vocab_size - said.top.shape[1]
    known = said.top[:, -1].isfinite()
    most = said.top.exp().sum(1) + others * said.top[:, -1].exp()
    if bool((most[known] < 1 - ROUNDING).any()):
        raise ValueError(
            f"{url} gives log-probabilities that leave {1 - float(most[known].min()):.0%} to "
            "nobody: they are cut or scaled. Start it with --logprobs-mode raw_logprobs."
        )


def _compare(labels: Tensor, ids: list[int], model: Any, name: str) -> None:
    """With what the same weights say here.

    Raises:
        ValueError: they are another model's.
    """
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    expected = logits.float().log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    difference = _difference(expected, labels)
    if not difference < _OTHER_MODEL:
        raise ValueError(
            f"the log-probabilities that are served differ by {difference:.1f} nats from those of "
            f"the weights in {name} at temperature 1: the server has another model under this "
            f"name, or scales its logits. {HINT}"
        )
    LOG.info(
        "The served teacher against the local weights: log-probabilities of labels differ by "
        f"{difference:.1e} nats"
    )


def _difference(a: Tensor, b: Tensor) -> float:
    """Of log-probabilities [n], in nats: the median over tokens."""
    return float((a - b).abs().median())
