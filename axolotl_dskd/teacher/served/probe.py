"""Try servers before training trusts them: model, context, tokenizer, and weights that are here.

What does not fit is refused, with what to start the server with. What cannot be known from here
(weights that are only on the server) is measured as far as it can be and said. What servers give
is tried in `probe_states` and `probe_logprobs`.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import psutil
import torch
from axolotl.utils.logging import get_logger
from transformers import AutoConfig, AutoTokenizer

from axolotl_dskd.cache import dataset_keys
from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.load import load_teacher
from axolotl_dskd.teacher.served.ends import local_weights
from axolotl_dskd.teacher.served.launch import served_name
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun
from axolotl_dskd.vllm import TEXT, check_model, check_tokenizer

LOG = get_logger(__name__)

#: Tokens of the text that are asked about, and of its beginning: short rows need no more context.
READ, PART = 48, 24
#: Larger checkpoints are not read to compare them: it would take longer than a minute.
_LARGEST_COMPARED = 8 << 30


class Probe:
    """What is asked of every server, whatever it gives.

    Args:
        servers: who is tried.
        spec: the teacher that they should serve.
        run: whose rows will be asked about.
    """

    def __init__(self, servers: Servers, spec: TeacherSpec, run: TrainingRun) -> None:
        self.servers = servers
        self.name = served_name(spec)
        self.config = spec.config
        lengths = (int(dataset_keys(dataset)[2].max()) for dataset in run.datasets() if dataset)
        #: Tokens of the longest row.
        self.longest = max(*lengths, run.longest_written, 0)

    @cached_property
    def ids(self) -> list[int]:
        """Of a plain text."""
        config = self.config
        tokenizer = AutoTokenizer.from_pretrained(
            config.tokenizer_name,
            revision=config.revision if config.tokenizer is None else None,
            trust_remote_code=config.trust_remote_code,
        )
        return tokenizer(TEXT, add_special_tokens=False)["input_ids"]

    def check(self, url: str, room: int) -> None:
        """The server knows the teacher, reads texts of `room` tokens, and has its tokenizer.

        Raises:
            ValueError: it does not.
        """
        check_model(
            self.servers,
            url,
            self.name,
            self.longest,
            "dskd.teacher.sequence_len",
            behind=room - self.longest,
        )
        check_tokenizer(self.servers, url, self.name, self.ids)

    def local_model(self) -> Any:
        """The teacher in float32 on the CPU, where all of it is on this machine and fits; or None,
        and it is said why.

        Raises:
            ValueError: it is here and cannot be loaded.
        """
        config = self.config
        size = local_weights(config)
        room = min(_LARGEST_COMPARED, psutil.virtual_memory().available // 4)
        if size is None:
            why = "are not here"
        elif size > room:
            why = "are too large to be read for that"
        elif self._is_quantised():  # what runs them needs a GPU, or is not installed
            why = "are quantised"
        else:
            plain = config.model_copy(update={"dtype": "float32", "server": None, "cache": None})
            return load_teacher(plain, torch.device("cpu"))
        LOG.info(f"The teacher's weights {why}: what is served is not compared with them")
        return None

    def _is_quantised(self) -> bool:
        config = self.config
        described = AutoConfig.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        return getattr(described, "quantization_config", None) is not None


def report_surprise(surprise: float, vocab_size: int) -> None:
    """Say how well the teacher, as it is served, knows a plain text.

    Args:
        surprise: nats per token.
        vocab_size: of what chance would choose from.
    """
    chance = math.log(vocab_size)
    text = (
        f"The served teacher gives a plain text {surprise:.2f} nats per token (chance would be "
        f"{chance:.2f})"
    )
    if surprise < 0.9 * chance:
        LOG.info(text)
    else:
        LOG.warning(f"{text}: it knows no better than chance. Is it the model of base_model?")
