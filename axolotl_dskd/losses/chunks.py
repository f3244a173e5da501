"""The one chunk mechanism: products with output heads, token chunk by token chunk.

No loss may hold logits for all tokens at once. `over` computes the logits of a few tokens, lets an
objective turn them into values and, in place, into the gradients of these logits, carries the
gradients back through the heads and reuses the memory for the next chunk. What is kept has the
size of the hidden states; `backward()` later only scales it: no logits are recomputed, and
autograd never holds one. Streams with the same head share one product.

An objective gives a function of one chunk (`functions` makes one from closed forms or from plain
PyTorch, and adds the student's cross-entropy, which costs no product) and says which rows belong
to which chunk (`parts`). `logprobs` is for losses of whole sequences, whose gradient is known at
their end only.

This module knows heads and states; not what is learned, nor what the sums are divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.output_head import OutputHead

#: Which rows of a stream: a range, or their indices.
Rows = slice | Tensor
#: Rows of each stream that one chunk takes; a stream that is not named takes no part in it.
Part = Mapping[str, Rows]
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Stream:
    """Hidden states whose logits a loss reads.

    Attributes:
        hidden: [n, d], with or without graph.
        head: what maps them to logits.
        trains_head: whether the head's own tensors get a gradient from this stream.
    """

    hidden: Tensor
    head: OutputHead
    trains_head: bool = False

    def __len__(self) -> int:
        return len(self.hidden)

    def trained_tensors(self) -> tuple[Tensor | None, ...]:
        """The head's tensors, None in the place of those that this stream does not train."""
        tensors = self.head.tensors()
        return tensors if self.trains_head else (None,) * len(tensors)


@dataclass(frozen=True)
class Budget:
    """How many tokens a chunk has; changes memory and speed, never a result.

    Attributes:
        tokens: that many, or None: as many as fit 768 MiB or 1/64 of the memory.
        memory: bytes of the device in total.
    """

    tokens: int | None = None
    memory: int = 48 << 30

    def size(self, *streams: Stream, copies: int = 0) -> int:
        """Tokens per chunk of these streams together: a power of two from 16 to 4096.

        Each token takes one row of logits in every stream, which turns into its own gradient. The
        same for the same machine, heads and dtype, whatever else is running.

        Args:
            copies: float32 copies of each stream's logits that are held beside them.
        """
        if self.tokens is not None:
            return self.tokens
        row = sum(s.head.vocab_size * (s.hidden.dtype.itemsize + 4 * copies) for s in streams)
        tokens = max(16, min(4096, min(768 << 20, self.memory // 64) // row))
        return 1 << (tokens.bit_length() - 1)


@dataclass(frozen=True)
class Chunk:
    """Logits of some tokens before scale and softcap, to be overwritten with their gradients.

    Attributes:
        rows: of each stream.
        linear: [n, V] `head.linear` of them, by stream.
        heads: by stream, for scale and softcap.
        scale: what gradients are multiplied by (float16 gives rare tokens' too few bits).
        learns: streams whose gradient is wanted.
    """

    rows: Part
    linear: dict[str, Tensor]
    heads: Mapping[str, OutputHead]
    scale: float
    learns: frozenset[str]


ChunkFunction = Callable[[Chunk], Values]


@dataclass(frozen=True)
class TermSpec:
    """A value that a chunk function gives per token.

    Attributes:
        of: the stream whose rows the values belong to.
        weight: in the loss; the function's gradients must agree with it. 0: only reported.
    """

    of: str
    weight: float = 0.0


@dataclass
class Sums:
    """What `over` found.

    Attributes:
        loss: scalar, the weighted sum of all values, differentiable.
        values: per token of the term's stream, float32 or wider, without graph; 0 in tokens that
            no chunk gave a value for.
    """

    loss: Tensor
    values: Values


def over(
    streams: Mapping[str, Stream],
    parts: Iterable[Part],
    compute: ChunkFunction,
    terms: Mapping[str, TermSpec],
) -> Sums:
    """Values and gradients of a loss over logits, chunk by chunk.

    Equals `sum(weight * compute(all logits)[term].sum())`, differentiable in the streams' states
    and the tensors of their heads. Products run in the dtype of the states.

    Args:
        streams: what to compute logits of, by name.
        parts: the chunks, each at most a `Budget.size` long. No row of a stream may stand in two.
        compute: values of a chunk; leaves the gradients of their weighted sum in its logits.
        terms: the values by name.
    """
    call = _Call(dict(streams), parts, compute, dict(terms), torch.is_grad_enabled())
    tensors: list[Tensor | None] = []
    for stream in streams.values():
        tensors += (stream.hidden, *stream.trained_tensors())
    loss, *values = _Over.apply(call, *tensors)
    return Sums(loss, dict(zip(terms, values, strict=True)))


@dataclass
class _Call:
    streams: dict[str, Stream]
    parts: Iterable[Part]
    compute: ChunkFunction
    terms: dict[str, TermSpec]
    with_gradients: bool


class _Gradients:
    """Where the gradients of one stream's states and head are gathered."""

    def __init__(self, stream: Stream, wanted: Sequence[bool]) -> None:
        self.hidden = torch.zeros_like(stream.hidden) if wanted[0] else None
        self.head = tuple(
            torch.zeros_like(t, dtype=wide(t.dtype)) if t is not None and needed else None
            for t, needed in zip(stream.head.tensors(), wanted[1:], strict=True)
        )
        self.trains_head = any(b is not None for b in self.head)
        self.wanted = self.trains_head or self.hidden is not None

    def put(self, rows: Rows, gradient: Tensor) -> None:
        """The gradient [n, d] of some rows."""
        if self.hidden is not None:
            self.hidden[rows] = gradient


def _dtypes_as_given(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run outside autocast, which would round a float32 head's products."""

    @wraps(forward)
    def run(ctx: Any, call: _Call, *tensors: Tensor | None) -> Any:
        device = next(iter(call.streams.values())).hidden.device
        with torch.autocast(device.type, enabled=False):
            return forward(ctx, call, *tensors)

    return run


class _Over(torch.autograd.Function):
    @staticmethod
    @_dtypes_as_given
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        wanted = [needed and call.with_gradients for needed in ctx.needs_input_grad[1:]]
        each = len(wanted) // len(call.streams)
        gradients = {
            name: _Gradients(stream, wanted[each * k : each * (k + 1)])
            for k, (name, stream) in enumerate(call.streams.items())
        }
        first = next(iter(call.streams.values())).hidden
        narrow = any(s.hidden.dtype == torch.float16 for s in call.streams.values())
        ctx.scale = 1024.0 if narrow else 1.0
        values = {
            name: first.new_zeros(len(call.streams[term.of]), dtype=wide(first.dtype))
            for name, term in call.terms.items()
        }
        for rows, found in _chunks(call, gradients, ctx.scale):
            for name, chunk_values in found.items():
                values[name][rows[call.terms[name].of]] = chunk_values
        loss = first.new_zeros((), dtype=wide(first.dtype))
        for name, term in call.terms.items():
            if term.weight:
                loss = loss + term.weight * values[name].sum()
        ctx.gradients = [g for s in gradients.values() for g in (s.hidden, *s.head)]
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values.values())
        return loss, *values.values()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss was differentiated twice; run its forward again")
        factor = grad_loss / ctx.scale
        scaled = [
            None if g is None else g.to(wide(g.dtype)).mul_(factor).to(dtype)
            for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return None, *scaled


def _chunks(
    call: _Call, gradients: dict[str, _Gradients], scale: float
) -> Iterator[tuple[Part, Values]]:
    """Each chunk's rows and values, once its gradients are gathered."""
    products = {
        (id(s.head), s.hidden.dtype): _Product(s.head.frozen(s.hidden.dtype))
        for s in call.streams.values()
    }
    product_of = {n: products[id(s.head), s.hidden.dtype] for n, s in call.streams.items()}
    heads = {name: product.head for name, product in product_of.items()}
    learns = frozenset(name for name, g in gradients.items() if g.wanted)
    for part in call.parts:
        states = {name: call.streams[name].hidden[rows] for name, rows in part.items()}
        linear: dict[str, Tensor] = {}
        for product in products.values():
            mine = {name: states[name] for name in part if product_of[name] is product}
            linear |= product.forward(mine)
        yield part, call.compute(Chunk(part, linear, heads, scale, learns))
        for product in products.values():
            product.backward(part, gradients)


class _Product:
    """A head, and the product that all streams with it share in a chunk.

    Works in one buffer: logits of a chunk, then their gradients, then the next chunk's logits.
    """

    def __init__(self, head: OutputHead) -> None:
        self.head = head
        self.states: dict[str, Tensor] = {}
        self.joined = self.linear = self.buffer = head.weight.new_empty((0, head.vocab_size))

    def forward(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """[n, V] `head.linear` of each stream's rows."""
        self.states = states
        if not states:
            return {}
        parts = list(states.values())
        self.joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(self.buffer) < len(self.joined):
            self.buffer = self.joined.new_empty((len(self.joined), self.head.vocab_size))
        self.linear = self.head.linear(self.joined, out=self.buffer[: len(self.joined)])
        return dict(zip(states, self.linear.split([len(s) for s in parts]), strict=True))

    def backward(self, part: Part, gradients: dict[str, _Gradients]) -> None:
        """From the gradients that lie in the logits' place to those of states and head."""
        mine = [gradients[name] for name in self.states]
        if mine and all(g.wanted and not g.trains_head for g in mine):
            lengths = [len(s) for s in self.states.values()]
            back = self.head.backward(self.joined, self.linear).split(lengths)
            for name, gradient in zip(self.states, back, strict=True):
                gradients[name].put(part[name], gradient)
            return
        start = 0
        for (name, states), gradient in zip(self.states.items(), mine, strict=True):
            linear = self.linear[start : start + len(states)]
            start += len(states)
            if gradient.wanted:
                gradient.put(part[name], self.head.backward(states, linear, gradient.head))
