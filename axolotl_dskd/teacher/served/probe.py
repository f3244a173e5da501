"""Try the servers before training trusts them: model, tokenizer, context, states.

What does not fit is refused, with what to start the server with. What cannot be known from here
(weights that are only on the server) is measured as far as it can be and said.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from transformers import AutoTokenizer

from axolotl_dskd.cache import dataset_keys
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.losses.agreement import agreement
from axolotl_dskd.models.heads import captured_head_input, single
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.load import load_teacher
from axolotl_dskd.teacher.served.ends import local_weights
from axolotl_dskd.teacher.served.wire import HINT, ask_for_states
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun
from axolotl_dskd.vllm import TEXT, check_model, check_tokenizer

LOG = get_logger(__name__)

#: Tokens of the text that are read, and of its beginning: short rows need no more context.
_READ, _PART = 48, 24
#: Relative differences of states. Below: rounding, 4-bit weights included. Above: another model.
_OTHER_MODEL = 0.5
#: Of a state from what the final norm gives: bfloat16 rounds by 0.004.
_NOT_NORMED = 0.05
#: Larger checkpoints are not read to compare them: it would take longer than a minute.
_LARGEST_COMPARED = 8 << 30


def probe(
    servers: Servers,
    name: str,
    spec: TeacherSpec,
    ends: Any,
    head: OutputHead,
    run: TrainingRun,
) -> None:
    """Try every server.

    Args:
        servers: who is tried.
        name: by which they know the teacher.
        spec: the teacher that they should serve.
        ends: its embedding, final norm and head as a model without layers.
        head: what maps states to logits.
        run: whose rows will be asked about; the longest must fit. Its first process compares with
            local weights, too.

    Raises:
        ValueError: a server does not answer, or serves something else.
    """
    config = spec.config
    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer_name,
        revision=config.revision if config.tokenizer is None else None,
        trust_remote_code=config.trust_remote_code,
    )
    lengths = (int(dataset_keys(dataset)[2].max()) for dataset in run.datasets if dataset)
    longest = max(lengths, default=0)
    longest = max(longest, run.longest_written)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    read_ids = ids[:_READ]
    given: list[Tensor] = []
    for url in servers.config.addresses:
        check_model(servers, url, name, longest, "dskd.teacher.sequence_len")
        check_tokenizer(servers, url, name, ids)
        whole, part = (
            _states(servers, url, name, read, head) for read in (read_ids, read_ids[:_PART])
        )
        _check_reading(url, whole, part)
        _check_norm(url, whole, ends)
        if given and (difference := _difference(given[0], whole)) > _OTHER_MODEL:
            raise ValueError(
                f"{servers.config.addresses[0]} and {url} give states that differ by "
                f"{difference:.0%}: they do not serve the same teacher."
            )
        given.append(whole)
    _report_surprise(given[0], read_ids, head)
    if run.rank == 0:
        _compare_with_local_weights(given[0], read_ids, config, head)


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
            f"from values of the final norm. {one}Start it with --pooler-config "
            f'\'{{"task":"token_embed","pooling_type":"ALL","use_activation":false}}\'. {HINT}'
        )


def _report_surprise(states: Tensor, ids: list[int], head: OutputHead) -> None:
    """Say how well the teacher, as it comes back through its head, knows a plain text."""
    logits = head.logits(states[:-1].to(head.weight)).float()
    labels = torch.tensor(ids[1:], device=logits.device)
    surprise = float(torch.nn.functional.cross_entropy(logits, labels))
    chance = float(torch.tensor(float(head.vocab_size)).log())
    text = (
        f"The served teacher gives a plain text {surprise:.2f} nats per token (chance would be "
        f"{chance:.2f})"
    )
    if surprise < 0.9 * chance:
        LOG.info(text)
    else:
        LOG.warning(f"{text}: it knows no better than chance. Is it the model of base_model?")


def _compare_with_local_weights(
    states: Tensor, ids: list[int], config: TeacherConfig, head: OutputHead
) -> None:
    """The same states, computed here once, where the whole checkpoint is here and fits.

    Raises:
        ValueError: they are another model's.
    """
    size = local_weights(config)
    room = min(_LARGEST_COMPARED, psutil.virtual_memory().available // 4)
    if size is None or size > room:
        why = "are not here" if size is None else "are too large to be read for that"
        LOG.info(f"The teacher's weights {why}: what is served is not compared with them")
        return
    plain = config.model_copy(update={"dtype": "float32", "server": None, "cache": None})
    cpu = torch.device("cpu")
    model = load_teacher(plain, cpu)
    with torch.no_grad(), captured_head_input(model) as captured:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    expected = single(captured, model)[0]
    difference = _difference(expected, states.cpu())
    if not difference < _OTHER_MODEL:
        raise ValueError(
            f"the states that are served differ by {difference:.0%} from those of the weights in "
            f"{config.base_model}: the server has another model under this name. {HINT}"
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
