"""A writer that lets a stock vLLM write, over HTTP and on token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch
from axolotl.utils.logging import get_logger

from axolotl_dskd.generation.vllm_models import Served
from axolotl_dskd.generation.writer import Answer, Sampling
from axolotl_dskd.ranks import first_for_all, max_over_ranks, raise_together
from axolotl_dskd.servers import Answer as Reply
from axolotl_dskd.servers import Servers
from axolotl_dskd.vllm import check_model, check_tokenizer

LOG = get_logger(__name__)

#: Bytes that a reply may have beside those of its tokens, and of each of them.
_REPLY, _TOKEN = 1 << 16, 256
#: Nats between what a server and the model itself give an answer's tokens, on average. Below:
#: rounding, 4-bit weights on one side included. Above: another model.
_OTHER_MODEL = 0.5
#: Tokens of an answer that are compared.
_COMPARED = 64


class VLLMWriter:
    """Writes with a server.

    A seed decides what is drawn, as the server draws; two servers whose arithmetic rounds otherwise
    (other batches are enough, in bfloat16) may write otherwise.

    Args:
        servers: the one that writes.
        served: what it writes with.
        end_ids: tokens that end an answer.
        longest: tokens that a prompt and its answer may have.
        shorter: the key that makes them less.
        text_ids: what the model's tokenizer makes of `vllm.TEXT`.
        device: of the ranks' tensors.
        model: a context in which the model itself can be run, on every rank alike: its first answer
            is then compared with it. None: not compared.

    Raises:
        ValueError: the server cannot be reached, or serves something else.
    """

    def __init__(
        self,
        servers: Servers,
        served: Served,
        *,
        end_ids: Sequence[int],
        longest: int,
        shorter: str,
        text_ids: Sequence[int],
        device: torch.device,
        model: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.servers = servers
        self.served = served
        self.end_ids = list(end_ids)
        self.device = device
        self._to_compare = model
        (url,) = servers.config.addresses

        def probe() -> None:
            check_model(servers, url, served.name, longest, shorter)
            check_tokenizer(servers, url, served.name, text_ids)

        first_for_all(probe, device)

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Answer]:
        """See `Writer`.

        Raises:
            ValueError: on every rank; the server stays away, loses what it was given again and
                again, or turns out to serve another model.
        """
        for _ in range(1 + self.servers.config.retries):
            self.served.bring_up()
            answers, problem = self._written(prompts, sampling, seeds)
            # Asked now: it may have been restarted since, and have written with something else.
            if not self.served.is_current():
                LOG.warning(
                    f"{self.servers.config.addresses[0]} has lost what it was given: it is given "
                    "it again, and what it wrote is written again"
                )
                continue
            raise_together(problem, self.device)
            self._compare(prompts, answers)
            return answers
        raise ValueError(
            f"{self.servers.config.addresses[0]} loses what it is given again and again. Does "
            f"another training use it? {self.servers.hint}"
        )

    def _written(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> tuple[list[Answer], str | None]:
        """The answers, or why there are none."""
        asked = [
            self._ask(prompt, sampling, seed) if sampling.room(prompt) > 0 else None
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        nothing = Answer([], [], ended=False)
        try:
            return [nothing if one is None else self._answer(one.result()) for one in asked], None
        except ValueError as error:
            for one in asked:
                if one is not None:
                    one.cancel()
            return [], str(error)

    def _ask(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Future[Reply]:
        room = sampling.room(prompt)
        body = {
            "model": self.served.name,
            "prompt": list(prompt),
            "max_tokens": room,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "stop_token_ids": self.end_ids,
            "ignore_eos": True,  # what ends an answer is said above
            # Else the habits that were published with a model would change what is drawn.
            **{"min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            "logprobs": 0,  # of the drawn tokens alone
            "return_token_ids": True,
            "cache_salt": self.served.version,  # what an older version has read is not reused
        }
        limit = _REPLY + _TOKEN * (room + len(prompt))
        return self.servers.start(self.servers.ask("POST", "/v1/completions", body, limit=limit))

    def _answer(self, reply: Reply) -> Answer:
        try:
            (choice,) = json.loads(reply.content)["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{reply.url} gives no completion with token ids and log-probabilities: is it a "
                f"vLLM of 0.32 or later? {self.servers.hint}"
            ) from None
        if len(ids) != len(logprobs):
            raise ValueError(
                f"{reply.url} gives {len(ids)} tokens with {len(logprobs)} log-probabilities"
            )
        return Answer(ids, logprobs, ended=bool(ids) and ids[-1] in self.end_ids)

    @torch.no_grad()
    def _compare(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> None:
        """Let the model read one of its first answers: does it give the tokens what they had where
        they were written?

        Raises:
            ValueError: on every rank; it does not.
        """
        if self._to_compare is None:
            return
        longest = max(range(len(answers)), key=lambda k: len(answers[k].ids), default=None)
        answer = Answer([], [], ended=False) if longest is None else answers[longest]
        prompt = [0] if longest is None or not answer.ids else list(prompts[longest])
        written = answer.ids[:_COMPARED]
        with self._to_compare() as model:
            device = model.get_input_embeddings().weight.device
            ids = torch.tensor([[*prompt, *written]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        problem = None
        if written:
            own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            given = torch.tensor(answer.logprobs[: len(written)], device=device)
            apart = float((own - given).abs().mean())
            where = self.servers.config.addresses[0]
            text = f"{where} gives its tokens log-probabilities that are {apart:.1e} nats from the"
            if not apart < _OTHER_MODEL:
                problem = f"{text} model's own: it serves another model. {self.servers.hint}"
            else:
                LOG.info(f"{text} model's own")
        raise_together(problem, self.device)
        if max_over_ranks(len(written), self.device):
            self._to_compare = None
