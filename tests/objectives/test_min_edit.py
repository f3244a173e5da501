"""MinED: the map of two vocabularies, and the loss against its plain form and published numbers."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from axolotl_dskd.config import MinEditConfig
from axolotl_dskd.data.token_bytes import first_tokens, token_bytes, translation
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import vocabulary_map as maps
from axolotl_dskd.objectives.base import Facts, Pair, Setting
from axolotl_dskd.objectives.edit_distance import nearest, warp
from axolotl_dskd.objectives.min_edit import MinEdit
from axolotl_dskd.objectives.vocabulary_map import vocabulary_map
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Matches, Side, View
from tests.support import plain_forms, tiny
from tests.support.views import HEADS, RandomPair, no_tokens

DATA = Path(__file__).parents[1] / "data" / "golden" / "methods"
FILES = sorted(Path(os.environ.get("DSKD_GOLDEN_METHODS_DIR") or DATA).glob("mined-*.npz"))
V, U = 400, 600


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AXOLOTL_DSKD_CACHE", str(tmp_path))
    return tmp_path


def plain_distance(a: bytes, b: bytes) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[0], table[:, 0] = np.arange(len(b) + 1), np.arange(len(a) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            step = min(table[i - 1, j] + 1, table[i, j - 1] + 1)
            table[i, j] = min(step, table[i - 1, j - 1] + (x != y))
    return int(table[-1, -1])


def words(count: int, seed: int, letters: bytes = b"abcd\xc3") -> list[bytes]:
    draw = random.Random(seed)
    return [bytes(draw.choices(letters, k=draw.randint(0, 8))) for _ in range(count)]


def test_nearest_is_the_first_candidate_at_the_least_edit_distance():
    strings, candidates = words(600, 1), words(70, 2)
    expected = [
        min((plain_distance(s, c), v) for v, c in enumerate(candidates) if c)[1] if s else -1
        for s in strings
    ]
    assert nearest(strings, candidates).tolist() == expected


def test_bytes_that_share_a_bit_of_the_filter_are_not_the_same():
    assert nearest([b"\x41\x01", b"A"], [b"\x81\xc1", b"\x01"]).tolist() == [1, 1]


def test_without_candidates_nothing_is_nearest():
    assert nearest([b"a", b""], [b"", b""]).tolist() == [-1, -1]
    assert nearest([], [b"a"]).tolist() == []


def test_warping_costs_no_more_than_any_other_path():
    strings, others = words(5, 3), words(6, 4)
    cost = np.array([[plain_distance(a, b) for b in others] for a in strings])

    def least(i: int, j: int) -> int:
        before = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        steps = [least(*step) for step in before if min(step) >= 0]
        return int(cost[i, j]) + min(steps, default=0)

    partners = warp(strings, others)
    path = sum(cost[i, first : last + 1].sum() for i, (first, last) in enumerate(partners))
    assert path == least(4, 5)
    assert partners[0, 0] == 0 and partners[-1, 1] == 5


def tokenizers() -> tuple[Any, Any]:
    return tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()


@pytest.mark.parametrize("kind", ["edit_distance", "first_token"])
@pytest.mark.parametrize("turned", [False, True])
def test_equal_tokens_and_ends_go_to_each_other(kind: str, turned: bool):
    student, teacher = tokenizers()[::-1] if turned else tokenizers()
    found = vocabulary_map(student, teacher, kind)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    assert any(found.exact) and not all(found.exact)
    for u, (target, exact) in enumerate(zip(found.targets, found.exact, strict=True)):
        if exact and u != teacher.eos_token_id:
            assert ours[target] == theirs[u]
        assert (target < 0) == (not theirs[u] and u != teacher.eos_token_id)
    assert found.targets[teacher.eos_token_id] == student.eos_token_id


@pytest.mark.parametrize("turned", [False, True])
def test_a_first_token_is_the_beginning_of_what_it_stands_for(turned: bool):
    student, teacher = tokenizers()[::-1] if turned else tokenizers()
    found = vocabulary_map(student, teacher, "first_token")
    ours, theirs = token_bytes(student), token_bytes(teacher)
    longer = 0
    for u, target in enumerate(found.targets):
        if target >= 0 and u != teacher.eos_token_id:
            assert ours[target] and theirs[u].startswith(ours[target])
            longer += len(ours[target]) > 1 and not found.exact[u]
    assert longer > 10  # no mere bytes


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_first_tokens_are_those_of_the_tokenizers_own_encoding(tokenizer: Any):
    texts = ["Emoji", "molecules", " jumps over", "Zürich", "def"]
    plain = tokenizer is tokenizers()[0]
    own = [tokenizer(t, add_special_tokens=False).input_ids[0] for t in texts if plain]
    # A sentencepiece tokenizer writes a space before a text of its own accord.
    own = own or [tokenizer(t[1:], add_special_tokens=False).input_ids[0] for t in [" jumps over"]]
    texts = texts if plain else [" jumps over"]
    assert first_tokens(tokenizer, [t.encode() for t in texts]) == own
    broken = "日".encode()[1:]
    (index,) = first_tokens(tokenizer, [broken])
    assert token_bytes(tokenizer)[index] == broken[:1]


def test_a_map_is_made_once(cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    student, teacher = tokenizers()
    first = vocabulary_map(student, teacher, "edit_distance")
    monkeypatch.setattr(maps, "nearest", None)  # calling it would fail
    student(["a", "longer text"], padding=True, truncation=True, max_length=8)
    assert vocabulary_map(student, teacher, "edit_distance") == first
    with pytest.raises(TypeError):  # another pair, another map
        vocabulary_map(teacher, student, "edit_distance")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\x00", None])
def test_a_damaged_map_is_made_anew(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
):
    said: list[str] = []
    monkeypatch.setattr(maps.LOG, "warning", said.append)
    student, teacher = tokenizers()
    first = vocabulary_map(student, teacher, "edit_distance")
    (path,) = cache_folder.rglob("*.json")
    whole = path.read_bytes()
    changed = whole.replace(b"1", b"2", 1) if damage is None else damage
    path.write_bytes(changed)
    assert vocabulary_map(student, teacher, "edit_distance") == first
    assert len(said) == 1 and "made anew" in said[0]
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_time(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (cache_folder / "vocabulary_maps").write_text("in the way")
    said: list[str] = []
    monkeypatch.setattr(maps.LOG, "warning", said.append)
    assert vocabulary_map(*tokenizers(), "first_token").targets
    assert any("cannot be kept" in text for text in said)


def objective(pair: RandomPair, chunk: int = 64, kd_ratio: float = 0.4, **keys: Any) -> MinEdit:
    facts = Facts(*tokenizers(), (V, U))
    made = MinEdit(MinEditConfig(**keys), facts, Setting(kd_ratio, Budget(chunk)))
    made.begin(pair.begun())
    return made


def plain_loss(
    pair: RandomPair, made: MinEdit, pairs: torch.Tensor, kd_ratio: float = 0.4
) -> torch.Tensor:
    """The loss from full logits."""
    logits = tuple(h.logits(x) for h, x in zip(pair.heads, pair.hidden, strict=True))
    targets = vocabulary_map(made.facts.student, made.facts.teacher, made.config.map).targets
    terms = plain_forms.min_edit(
        logits,
        pair.sides[0].labels,
        pairs,
        targets + [-1] * (U - len(targets)),
        temperature=made.config.temperature,
        one_hot=made.config.one_hot,
    )
    return (1 - kd_ratio) * terms["ce"] + kd_ratio * terms["min_edit"]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("keys", [{}, {"map": "first_token"}, {"one_hot": True}])
def test_loss_and_gradients_equal_the_plain_form_in_every_chunk_size(kind: str, keys: dict):
    pair = RandomPair(V, U, kind)
    for chunk in (1, 3, 64):
        made = objective(pair, chunk, **keys)
        targets = made._targets.tolist()
        fitting = plain_forms.min_edit_pairs(pair.matches, pair.sides[1].labels, targets)
        assert 2 < len(fitting) < len(pair.matches.starts)
        out = made(*pair.views(), pair.matches)
        expected = plain_loss(pair, made, fitting)
        torch.testing.assert_close(out.loss, expected)
        for ours, theirs in zip(pair.gradients(out.loss), pair.gradients(expected), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert out.tokens == 13 and out.terms.keys() == made.terms.keys()
        assert sorted(out.terms["aligned"].values.nonzero().flatten().tolist()) == sorted(
            fitting[:, 0].tolist()
        )
        assert len(out.terms["translated"].values) == len(fitting)
        assert (out.terms["translated"].values < 1).all()


def test_what_goes_nowhere_is_left_out_not_spread():
    # A teacher that is sure of a token without text teaches next to nothing.
    pair = RandomPair(V, U)
    made = objective(pair)
    (nowhere,) = [u for u in [tokenizers()[1].bos_token_id] if made._targets[u] < 0]
    pair.heads[1].tensors[0][nowhere] += 1000 * pair.hidden[1].sum(0)
    pair.hidden[1][:] = pair.hidden[1].sum(0)
    assert made(*pair.views(), pair.matches).terms["min_edit"].values.abs().max() < 1e-6


def test_an_end_of_turn_that_is_not_the_students_end_has_cross_entropy_alone():
    """As of Gemma, whose template writes another token than its tokenizer's end: the teacher's end
    goes to the latter, and would speak against the label."""
    student, teacher = tokenizers()
    others = {student.eos_token_id: 1.0, student.convert_tokens_to_ids("<|system|>"): 0.0}
    for end, compared in others.items():
        pair = RandomPair(V, U)
        i, j = pair.matches.exact[0].tolist()
        pair.matches.spans[i] = pair.matches.teacher_spans[j]
        pair.sides[0].labels[i], pair.sides[1].labels[j] = end, teacher.eos_token_id
        out = objective(pair, kd_ratio=1.0)(*pair.views(), pair.matches)
        assert float(out.terms["aligned"].values[i]) == compared
        assert bool(pair.gradients(out.loss)[0][i].any()) == bool(compared)


def test_probabilities_are_carried_over_whole():
    pair = RandomPair(V, U)
    made = objective(pair)
    p = torch.rand(3, U, dtype=torch.float64).softmax(-1)
    lost = p[:, made._targets < 0].sum(-1)
    torch.testing.assert_close(made.carried(p).sum(-1), 1 - lost)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_give_what_float32_gives(dtype: torch.dtype):
    narrow, exact = RandomPair(V, U, "all", dtype), RandomPair(V, U, "all")
    for some, other in zip(exact.heads, narrow.heads, strict=True):
        some.tensors = [None if t is None else t.detach().double() for t in other.tensors]
    with torch.no_grad():
        for k in (0, 1):
            exact.hidden[k].copy_(narrow.hidden[k])
    exact.leaves = [exact.hidden[0], *exact.heads[0].trained()]
    found = [objective(pair)(*pair.views(), pair.matches).loss for pair in (narrow, exact)]
    assert found[0].dtype == torch.float32
    assert float(found[0].detach()) == pytest.approx(float(found[1].detach()), rel=2e-2)
    for ours, truth in zip(narrow.gradients(found[0]), exact.gradients(found[1]), strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() < 5e-2 * truth.norm()


@pytest.mark.parametrize("keys", [{}, {"pairs": "dtw", "one_hot": True}])
def test_a_batch_without_tokens_has_the_loss_zero(keys: dict):
    pair = no_tokens(V, U)
    out = objective(pair, **keys)(*pair.views(), pair.matches)
    assert float(out.loss.detach()) == 0.0 and out.tokens == 0
    assert all(float(g.abs().sum()) == 0.0 for g in pair.gradients(out.loss))


@pytest.mark.parametrize(
    ("keys", "word"),
    [({"map": "bytes"}, "edit_distance"), ({"pairs": "ordinal"}, "dtw"), ({"top_k": 4}, "top_k")],
)
def test_a_key_that_it_has_not_is_refused(keys: dict, word: str):
    with pytest.raises(ValidationError, match=word):
        MinEditConfig(**keys)


def test_a_tokenizer_that_cannot_be_undone_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="do not determine the text"):
        MinEdit(MinEditConfig(), Facts(tokenizers()[0], other, (V, 2)), Setting())


def test_what_takes_part_is_said():
    facts = Facts(*tokenizers(), (V, U))
    said = [
        MinEdit(MinEditConfig(pairs=pairs), facts, Setting()).describe()
        for pairs in ("starts", "dtw")
    ]
    assert "begin at the same byte" in said[0] and "time warping" in said[1]


class Published(MinEdit):
    """One logit per student token: the first teacher token's that goes to it."""

    def carried(self, probabilities: torch.Tensor) -> torch.Tensor:
        T = self.config.temperature
        target = torch.full((len(probabilities), self._vocab_size), -1e5 / T)
        for u in reversed(range(len(self._targets))):
            target[:, self._targets[u]] = probabilities[:, u].log()
        return target.softmax(-1)


class Golden:
    """A file's tokenizers, views and matches; a head that is the identity gives its logits."""

    def __init__(self, path: Path) -> None:
        z = {name: np.asarray(value) for name, value in np.load(path).items()}
        self.numbers = {k: torch.from_numpy(v) for k, v in z.items() if v.dtype.kind != "U"}
        self.masks = [self.numbers[f"{side}_labels"] != -100 for side in ("student", "teacher")]
        self.logits = self.numbers["student_logits"].clone().requires_grad_()
        logits = (self.logits, self.numbers["teacher_logits"])
        self.tokenizers, self.views, self.heads = [], [], []
        for side, mask, states in zip(("student", "teacher"), self.masks, logits, strict=True):
            vocabulary = {token: i for i, token in enumerate(z[f"{side}_vocab"].tolist())}
            backend = Tokenizer(models.BPE(vocabulary, []))
            backend.decoder = decoders.ByteLevel()
            (end,) = {"</s>", "<|end|>"} & vocabulary.keys()
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
            self.tokenizers.append(tokenizer)
            sample_ids = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
            ids, labels = self.numbers[f"{side}_input_ids"], self.numbers[f"{side}_labels"]
            self.heads.append(OutputHead(torch.eye(len(vocabulary))))
            tokens = Side(ids[mask], labels[mask], sample_ids)
            self.views.append(View(tokens, self.heads[-1], states[mask]))
        spans = [
            self.numbers[f"{side}_spans"][mask]
            for side, mask in zip(("student", "teacher"), self.masks, strict=True)
        ]
        spans = [torch.stack([s[:, 0], s[:, 1] + (s[:, 0] == s[:, 1])], 1) for s in spans]
        keys = [
            [(int(s), int(b)) for s, b in zip(view.tokens.sample_ids, span[:, 0], strict=True)]
            for view, span in zip(self.views, spans, strict=True)
        ]
        starts = [(i, keys[1].index(key)) for i, key in enumerate(keys[0]) if key in keys[1]]
        nothing = torch.zeros((0, 2), dtype=torch.long)
        groups = [torch.zeros(len(view), dtype=torch.long) for view in self.views]
        self.matches = Matches(*spans, nothing, torch.tensor(starts), *groups)

    def objective(self, kind: type[MinEdit], **keys: Any) -> MinEdit:
        sizes = tuple(head.vocab_size for head in self.heads)
        facts = Facts(*self.tokenizers, sizes)
        made = kind(MinEditConfig(**keys), facts, Setting(1.0, Budget(4)))
        weights = tuple(head.weight for head in self.heads)
        made.begin(Pair(tuple(self.heads), weights, torch.device("cpu")))
        return made


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_the_golden_files_are_there():
    assert len(FILES) >= 3


def test_the_map_equals_the_published_one(golden: Golden):
    found = vocabulary_map(*golden.tokenizers, "edit_distance")
    assert found.targets == golden.numbers["teacher_to_student"].tolist()
    assert found.exact == [i >= 0 for i in translation(*golden.tokenizers[::-1])]


def test_warped_pairs_equal_the_published_ones(golden: Golden):
    made = golden.objective(MinEdit, pairs="dtw")
    out = made(*golden.views, golden.matches)
    follows = golden.numbers["follows_teacher"][golden.masks[0]]
    assert torch.equal(out.terms["aligned"].values.bool(), follows)


@pytest.mark.parametrize("T", [1, 2])
def test_loss_and_gradient_of_one_logit_per_token_equal_the_published_ones(golden: Golden, T: int):
    made = golden.objective(Published, pairs="dtw", one_hot=True, temperature=T)
    out = made(*golden.views, golden.matches)
    out.loss.backward()
    expected = float(golden.numbers[f"out_sum_T{T}"])
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        golden.logits.grad, golden.numbers[f"grad_sum_T{T}"], rtol=1e-4, atol=1e-6
    )


def test_summed_probabilities_differ_from_one_logit_per_token(golden: Golden):
    """Published drops 0.3 to 0.4 of the teacher's probability; ours loses none of it."""
    sums = [
        float(golden.objective(kind, pairs="dtw")(*golden.views, golden.matches).sums()["min_edit"])
        for kind in (Published, MinEdit)
    ]
    numbers = golden.numbers
    z, t = numbers["student_logits"].double() / 2, numbers["teacher_logits"].double() / 2
    follows, partner = numbers["follows_teacher"], numbers["dtw_first_last_teacher_position"]
    p = torch.zeros(*t.shape[:2], z.shape[-1], dtype=torch.float64)
    p.index_add_(2, numbers["teacher_to_student"], t.softmax(-1))
    q = z[follows].log_softmax(-1)
    rows = follows.nonzero()[:, 0]
    target = p[rows, partner[follows][:, 0]]
    ours = float((torch.xlogy(target, target) - target * q).sum())
    assert sums[1] == pytest.approx(ours, rel=1e-5)
    assert abs(sums[0] - sums[1]) > 0.005 * sums[0], sums


def test_start_pairs_are_the_default(golden: Golden):
    out = golden.objective(MinEdit)(*golden.views, golden.matches)
    i, j = golden.matches.starts.unbind(1)
    ours, theirs = golden.matches.spans[i], golden.matches.teacher_spans[j]
    fits = (ours[:, 1] - ours[:, 0]) <= (theirs[:, 1] - theirs[:, 0])
    assert 0 < int(fits.sum()) == int(out.terms["aligned"].values.sum())
