"""What the rows of a step ask: their prompts, each with its place and its seed.

Nothing here depends on how rows are spread over batches, packs or ranks. Knows rows and prompts;
not who writes or what is done with the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.data.answers import AnsweredRows, Prompt, RoutedAnswers
from axolotl_dskd.generation import Sampling, prompt_seed
from axolotl_dskd.samples.tally import Tally

Row = dict[str, Any]
NO_ROOM = "no room"


@dataclass(frozen=True)
class Preferred:
    """The data's own answer to a prompt, where it stays beside those that are written.

    Attributes:
        bin, at: where its row stands.
        row: with that answer alone.
    """

    bin: list[Row]
    at: int
    row: Row


@dataclass(frozen=True)
class Place:
    """A sample of a step that is to be written.

    Attributes:
        bin: the packed or padded row that it stands in.
        at: its number in there.
        prompt: what is answered.
        seed: of the answer.
        preferred: the data's own answer, where it stays beside this one.
    """

    bin: list[Row]
    at: int
    prompt: Prompt
    seed: int
    preferred: Preferred | None


@dataclass
class Asking:
    """Finds what is to be written.

    Attributes:
        config: whose turns are written, and how many answers there are to a prompt.
        answered: takes prompts out of rows.
        sampling: how answers will be drawn.
        contrast: the data's own answer stays beside those to its prompt.
        tally: where rows are counted that cannot be asked.
    """

    config: StudentSamplesConfig
    answered: AnsweredRows | RoutedAnswers
    sampling: Sampling
    contrast: bool
    tally: Tally

    @property
    def group(self) -> int:
        """Rows that belong together: answers to one prompt, and the data's own beside them."""
        return self.config.per_prompt + self.contrast

    def __call__(self, bins: list[list[Row]], step: int) -> list[Place]:
        """What is to be written of a micro-batch: `per_prompt` rows in a row answer the first
        one's prompt. With contrast there is one more, which keeps the data's answer.

        Args:
            bins: packed or padded rows of samples.
            step: optimizer steps made so far.
        """
        samples = [(bin, at) for bin in bins for at in range(len(bin))]
        places = []
        for start in range(0, len(samples), self.group):
            group = samples[start : start + self.group]
            bin, at = group[0]
            prompt = self.prompt(bin[at], step)
            room = 0 if prompt is None else self._room(prompt)
            if prompt is None or room <= 0:
                why = "no prompt" if prompt is None else NO_ROOM
                self.tally.refused[why] += len(group) - self.contrast
                continue
            preferred = None
            if self.contrast:
                preferred = Preferred(bin, at, self.answered.alone(bin[at], prompt))
            ids = prompt["student"].ids
            for copy in range(self.contrast, len(group)):
                seed = prompt_seed(ids, self.config.seed, step, copy)
                places.append(Place(*group[copy], prompt, seed, preferred))
        return places

    def prompt(self, row: Row, step: int) -> Prompt | None:
        """What a row asks in a step: up to its last answer, or, with `turns: all`, to one of those
        that there is room for, each as likely. The seed, the step and the row alone decide.

        Args:
            row: of the data set.
            step: optimizer steps made so far.
        """
        if self.config.turns == "last":
            return self.answered.prompt(row)
        turns = self.answered.turns(row)
        turns = [turn for turn in turns if self._room(turn) > 0] or turns[-1:]
        if not turns:
            return None
        return turns[prompt_seed(row["input_ids"], self.config.seed, step) % len(turns)]

    def _room(self, prompt: Prompt) -> int:
        """How many tokens can be written; where the teacher draws along, it has to read them."""
        room = self.sampling.room(prompt["student"].ids)
        return min(room, self.answered.teachers_room(prompt)) if self.config.teacher_mix else room
