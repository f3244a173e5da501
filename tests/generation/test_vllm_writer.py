"""A real vLLM writes what the student of this moment would, and never what another one would."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from axolotl_dskd.config import StudentWriterConfig
from axolotl_dskd.generation import (
    Answer,
    Sampling,
    StudentAdapter,
    StudentWeights,
    VLLMWriter,
    WritingServer,
    prompt_seed,
)
from axolotl_dskd.models.student import Student
from axolotl_dskd.servers import Servers
from axolotl_dskd.vllm import TEXT
from tests.support import tiny
from tests.support.vllm import VLLM

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CPU = torch.device("cpu")
#: The last one fills whole blocks of a server's prefix cache.
PROMPTS = [[3, 4, 5], [11, 12, 13, 14, 15, 16, 17, 18], [9], [21, 22, 23, 24], list(range(8, 308))]
GREEDY = Sampling(12, temperature=0.0)
LONGEST = 512
SYNCS = ["weights", "adapter"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    folder = tmp_path_factory.mktemp("writer")
    tiny.save_pair(folder, hidden_sizes=(128, 32))  # vLLM wants heads of 32
    server = VLLM.that_writes(folder / "student", folder)
    server.start()
    yield server
    server.stop()


class Learner:
    """What is being trained, and how often it was handed over."""

    def __init__(
        self, server: VLLM, tmp_path: Path, sync: str, *, every: int = 1, **writer: Any
    ) -> None:
        self.model: Any = LlamaForCausalLM.from_pretrained(server.log.parent / "student").eval()
        if sync == "adapter":
            torch.manual_seed(2)
            adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
            self.model = get_peft_model(self.model, adapter).eval()
            server.reset_weights(server.log.parent / "student")
        self.step = self.saved = 0
        self.folder = tmp_path / "handed over"
        self.student = Student(lambda: self.model, Accelerator(cpu=True), 400)
        config = StudentWriterConfig(url=server.url, model="student", retries=60)
        self.servers = Servers(config, "(how to start it)")
        kind = StudentAdapter if sync == "adapter" else StudentWeights
        self.served = kind(
            self.servers,
            "student",
            step=lambda: self.step,
            every=every,
            save=self.save,
            folder=self.folder,
            device=CPU,
        )
        tokenizer = tiny.byte_level_tokenizer()
        settings: dict[str, Any] = {
            "end_ids": [7],
            "longest": LONGEST,
            "shorter": "sequence_len",
            "text_ids": tokenizer(TEXT, add_special_tokens=False)["input_ids"],
            "device": CPU,
            "model": self.student.running,
        }
        self.writer = VLLMWriter(self.servers, self.served, **{**settings, **writer})

    def save(self, path: Path) -> None:
        self.saved += 1
        self.student.save(path)

    @torch.no_grad()
    def train(self) -> None:
        """A step that changes what it says."""
        self.step += 1
        torch.manual_seed(self.step)
        for name, parameter in self.model.named_parameters():
            if "lora" in name or not hasattr(self.model, "peft_config"):
                parameter += 0.05 * torch.randn_like(parameter)

    def write(self, sampling: Sampling, number: int = 0) -> list[Answer]:
        seeds = [prompt_seed(prompt, number) for prompt in PROMPTS]
        return self.writer.write(PROMPTS, sampling, seeds)

    @torch.no_grad()
    def logprobs(self, prompt: list[int], ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), V] from one forward."""
        logits = self.model(torch.tensor([[*prompt, *ids]])).logits[0].float()
        return logits.log_softmax(-1)[len(prompt) - 1 : -1]

    def wrote(self, answers: list[Answer]) -> bool:
        """Whether greedy answers are this student's."""
        return all(
            list(answer.ids) == self.logprobs(prompt, answer.ids).argmax(-1).tolist()
            for prompt, answer in zip(PROMPTS, answers, strict=True)
        )


@pytest.mark.parametrize("sync", SYNCS)
def test_answers_are_the_students_of_this_moment(server: VLLM, tmp_path: Path, sync: str):
    learner = Learner(server, tmp_path, sync)
    for _ in range(3):
        before = learner.write(GREEDY)
        assert learner.wrote(before)
        assert [a.ids for a in learner.write(GREEDY)] == [a.ids for a in before]
        learner.train()
        assert not learner.wrote(before)
    assert learner.saved == 3  # once a step, not once a call
    assert len(list(learner.folder.iterdir())) == 1


def test_between_updates_the_student_of_the_last_one_writes(server: VLLM, tmp_path: Path):
    learner = Learner(server, tmp_path, "adapter", every=2)
    learner.train()
    first = learner.write(GREEDY)
    learner.train()
    second = learner.write(GREEDY)
    learner.train()
    assert [a.ids for a in learner.write(GREEDY)] == [a.ids for a in second]
    assert [a.ids for a in first] != [a.ids for a in second]
    assert learner.saved == 2


@pytest.mark.parametrize("keys", [{}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.5}], ids=str)
def test_logprobs_are_those_of_a_plain_forward_whatever_is_drawn(
    server: VLLM, tmp_path: Path, keys: dict[str, Any]
):
    learner = Learner(server, tmp_path, "weights")
    sampling = Sampling(12, max_length=310, **keys)
    answers = learner.write(sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.ids) <= sampling.room(prompt)
        assert answer.ended == (answer.ids[-1] == 7)
        plain = learner.logprobs(prompt, answer.ids)
        expected = plain.gather(1, torch.tensor(answer.ids)[:, None]).squeeze(1)
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    assert [a.ids for a in learner.write(sampling)] == [a.ids for a in answers]
    assert [a.ids for a in learner.write(sampling, number=1)] != [a.ids for a in answers]


def test_an_answer_ends_where_the_model_ends_it(server: VLLM, tmp_path: Path):
    learner = Learner(server, tmp_path, "weights", end_ids=list(range(0, 400, 20)))
    answers = [a for number in range(3) for a in learner.write(Sampling(24), number)]
    assert {a.ended for a in answers} == {True, False}
    for answer in answers:
        assert answer.ended == (answer.ids[-1] % 20 == 0)
        assert all(i % 20 for i in answer.ids[:-1])


def test_a_prompt_without_room_is_answered_with_nothing(server: VLLM, tmp_path: Path):
    learner = Learner(server, tmp_path, "weights")
    answers = learner.write(Sampling(12, max_length=8))
    assert answers[1] == answers[4] == Answer([], [], ended=False)
    assert [len(a.ids) for a in answers[:4]] == [5, 0, 7, 4]
    assert learner.writer.write([], GREEDY, []) == []


@pytest.mark.parametrize("sync", SYNCS)
def test_a_server_that_was_restarted_is_given_the_student_again(
    server: VLLM, tmp_path: Path, sync: str
):
    learner = Learner(server, tmp_path, sync)
    learner.train()
    before = learner.write(GREEDY)
    if sync == "weights":
        server.stop(signal.SIGKILL)
        server.launch()
    else:  # what a restart would leave
        learner.served._post("/v1/unload_lora_adapter", {"lora_name": learner.served.name})
    after = learner.write(GREEDY)
    assert [a.ids for a in after] == [a.ids for a in before]
    assert learner.wrote(after)
    assert learner.saved == 2


def test_what_another_training_writes_with_is_not_taken_for_ones_own(server: VLLM, tmp_path: Path):
    one, two = (Learner(server, tmp_path / str(k), "weights") for k in range(2))
    two.train()
    for learner in (one, two, one):
        assert learner.wrote(learner.write(GREEDY))
    assert (one.saved, two.saved) == (2, 1)


# ---- servers that are something else -------------------------------------------------------------


def test_another_model_behind_the_name_is_found_out(server: VLLM, tmp_path: Path):
    """An adapter for weights that are not the server's."""
    learner = Learner(server, tmp_path, "adapter")
    with torch.no_grad():
        for parameter in learner.model.get_base_model().parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    with pytest.raises(ValueError, match="it serves another model"):
        learner.write(GREEDY)


def test_what_does_not_fit_is_refused_before_anything_is_written(server: VLLM, tmp_path: Path):
    for keys, message in (
        ({"text_ids": [5, 6, 7]}, "another tokenizer"),
        ({"longest": LONGEST + 1}, r"--max-model-len 513, or set sequence_len: 512"),
    ):
        with pytest.raises(ValueError, match=message):
            Learner(server, tmp_path, "adapter", **keys)


def test_an_adapter_that_the_server_cannot_take_is_a_clear_end(server: VLLM, tmp_path: Path):
    learner = Learner(server, tmp_path, "adapter")
    plain = LlamaForCausalLM.from_pretrained(server.log.parent / "student")
    learner.model = get_peft_model(plain, LoraConfig(r=64, target_modules=["q_proj"])).eval()
    with pytest.raises(ValueError, match=r"load_lora_adapter refuses.*rank 64"):
        learner.write(GREEDY)


def test_the_command_starts_a_server_that_takes_what_it_shall_take():
    """The flags of `VLLM.that_writes` are those of the printed command, and some of a CPU's."""
    wanted = WritingServer("http://127.0.0.1:8000", "m", "student", 128, adapter_rank=20)
    assert wanted.command()[-2:] == ["--max-lora-rank", "32"]
    assert wanted.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    weights = WritingServer("http://127.0.0.1:8000", "m", "m", 128, takes_weights=True)
    assert weights.in_words().startswith("VLLM_SERVER_DEV_MODE=1 python -m vllm")
