"""Try what servers give as states, before training trusts them."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.losses.agreement import agreement
from axolotl_dskd.models.heads import captured_head_input, single
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.served.launch import HINT, POOLER, served_name
from axolotl_dskd.teacher.served.probe import PART, READ, Probe, report_surprise
from axolotl_dskd.teacher.served.wire import ask_for_states
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun

LOG = get_logger(__name__)

#: Relative differences of states. Below: rounding, 4-bit weights included. Above: another model.
_OTHER_MODEL = 0.5
#: Of a state from what the final norm gives: bfloat16 rounds by 0.004.
_NOT_NORMED = 0.05


def probe_states(
    servers: Servers, spec: TeacherSpec, ends: Any, head: OutputHead, run: TrainingRun
) -> None:
    """Try every server.

    Args:
        servers: who is tried.
        spec: the teacher that they should serve.
        ends: its embedding, final norm and head as a model without layers.
        head: what maps states to logits.
        run: whose rows will be asked about; the longest must fit. Its first process compares with
            local weights, too.

    Raises:
        ValueError: a server does not answer, or serves something else.
    """
    probe, name = Probe(servers, spec, run), served_name(spec)
    ids = probe.ids[:READ]
    given: list[Tensor] = []
    for url in servers.config.addresses:
        probe.check(url, probe.longest)
        whole, part = (_states(servers, url, name, read, head) for read in (ids, ids[:PART]))
        _check_reading(url, whole, part)
        _check_norm(url, whole, ends)
        if given and (difference := _difference(given[0], whole)) > _OTHER_MODEL:
            raise ValueError(
                f"{servers.config.addresses[0]} and {url} give states that differ by "
                f"{difference:.0%}: they do not serve the same teacher."
            )
        given.append(whole)
    logits = head.logits(given[0][:-1].to(head.weight)).float().cpu()
    labels = torch.tensor(ids[1:])
    surprise = torch.nn.functional.cross_entropy(logits, labels)
    report_surprise(float(surprise), head.vocab_size)
    if run.rank == 0 and (model := probe.local_model()) is not None:
        _compare(given[0], ids, model, head, spec.config.base_model)


def _states(servers: Servers, url: str, name: str, ids: list[int], head: OutputHead) -> Tensor:
    """[len(ids), D] float32 of one server."""
    width, dtype = head.hidden_size, head.weight.dtype
    asked = ask_for_states(servers, name, ids, width=width, dtype=dtype, url=url)
    return servers.start(asked).result().float()


def _check_reading(url: str, whole: Tensor, part: Tensor) -> None:
    """A causal model says the same of a text's beginning, whatever follows."""
    difference = _difference(whole[: len(part)], part)
    if difference > _OTHER_MODEL:
        raise ValueError(
            f"{url} gives other states for the beginning of a text once the text goes on "
            f"({difference:.0%}): it does not read causally, or pools tokens. {HINT}"
        )


def _check_norm(url: str, states: Tensor, ends: Any) -> None:
    """The states are those behind the final norm, and nothing has scaled them since.

    With N the final norm, b = N(0) and w from N(±1), N gives back what (s - b) / w is made of,
    only if s is a value of N. Not judged where a model adds something in front of its norm.
    """
    width = states.shape[1]
    sign = torch.tensor([1.0, -1.0]).repeat(width // 2 + 1)[:width]

    @torch.no_grad()
    def norm(x: Tensor) -> Tensor:
        device, dtype = ends.get_input_embeddings().weight.device, next(ends.parameters()).dtype
        with captured_head_input(ends) as captured:
            ends(inputs_embeds=x[None].to(device, dtype), use_cache=False)
        return single(captured, ends)[0].float().cpu()

    bias = norm(torch.zeros(1, width))
    weight = (norm(sign[None]) - bias) / sign

    def error(values: Tensor) -> float:
        return _difference(values, norm((values - bias) / weight))

    noise = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    if not error(norm(noise)) < _NOT_NORMED:
        LOG.info("The final norm of this architecture is not known: scales are not checked")
        return
    if not (found := error(states)) < _NOT_NORMED:
        lengths = states.norm(dim=1)
        one = "They have length 1: it normalises them. " if (lengths - 1).abs().max() < 0.01 else ""
        raise ValueError(
            f"{url} does not give what the teacher's head takes: its states are {found:.0%} off "
            f"from values of the final norm. {one}Start it with --pooler-config '{POOLER}'. {HINT}"
        )


def _compare(states: Tensor, ids: list[int], model: Any, head: OutputHead, name: str) -> None:
    """With the states that the same weights give here.

    Raises:
        ValueError: they are another model's.
    """
    with torch.no_grad(), captured_head_input(model) as captured:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    expected = single(captured, model)[0]
    difference = _difference(expected, states.cpu())
    if not difference < _OTHER_MODEL:
        raise ValueError(
            f"the states that are served differ by {difference:.0%} from those of the weights in "
            f"{name}: the server has another model under this name. {HINT}"
        )
    log_p, log_q = (
        head.logits(s.to(head.weight)).float().log_softmax(-1) for s in (expected, states)
    )
    apart = agreement(log_p, log_q)
    LOG.info(
        f"The served teacher against the local weights: states differ by {difference:.1e}, KL "
        f"{float(apart.kl.mean()):.1e} nats per token"
    )


def _difference(a: Tensor, b: Tensor) -> float:
    """Of states [n, D], relative: the median over tokens."""
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).median())
