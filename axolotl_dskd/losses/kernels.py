"""The elementwise part of the loss as one Triton kernel: `elementwise.py` in one launch a chunk.

One program works on one row. It reads the row's logits three times (they stay in the GPU's second
cache): for the maxima and sums of all softmaxes, for the divergence's value, for the gradients,
which it writes over the logits. Forward KL, which the teacher space always is, needs no second
reading: its value is a mean of log-ratios, its sum of G is -1. (Nor would reverse KL, but its
gradient is a difference that only sums of like rounding keep exact.) All arithmetic is float32 in
log space. Every divergence is given by two numbers per token of the vocabulary: what it adds to
the value, and G, the derivative of the value with respect to log q; the gradient of a logit is then
`G - q * sum(G)` (`divergences.py`).

Run on a CPU by Triton's interpreter (`TRITON_INTERPRET=1`), which is how the tests compare it.
"""

# Triton's kernels are not typed Python.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from axolotl_dskd.losses.divergences import DIVERGENCES, Divergence
from axolotl_dskd.losses.elementwise import PairTerms, Weights
from axolotl_dskd.output_head import OutputHead

#: Numbers of a row that a program holds at once, and the warps that share them.
_BLOCK, _WARPS = 2048, 8
_BISECTIONS = 30

# Names of divergences as the kernel's compile-time constants.
_CODES = {name: code for code, name in enumerate(DIVERGENCES)}
_FORWARD_KL = tl.constexpr(_CODES["forward_kl"])
_REVERSE_KL = tl.constexpr(_CODES["reverse_kl"])
_JS = tl.constexpr(_CODES["js_divergence"])
_SKEWED_FORWARD_KL = tl.constexpr(_CODES["skewed_forward_kl"])
_SKEWED_REVERSE_KL = tl.constexpr(_CODES["skewed_reverse_kl"])
_ADAPTIVE_KL = tl.constexpr(_CODES["adaptive_kl"])
_TVD = tl.constexpr(_CODES["tvd"])


@triton.jit
def _logits(pointer, offsets, inside, scale, softcap, SOFTCAP: tl.constexpr):
    """The head's activation, -inf outside of the vocabulary."""
    x = tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))  # softcap * tanh(x / softcap)
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _store(pointer, offsets, inside, x, grad, scale, softcap, SOFTCAP: tl.constexpr):
    """The gradient of the head's product, given that of its logits x."""
    if SOFTCAP:
        grad = grad * (1.0 - (x / softcap) * (x / softcap))
    grad = grad * scale
    tl.store(pointer + offsets, grad.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _value_and_G(log_p, log_q, p, q, parameter, weight, DIVERGENCE: tl.constexpr):
    """What each token of the vocabulary adds to the value, and d value / d log q."""
    if DIVERGENCE == _FORWARD_KL:
        value = p * (log_p - log_q)
        G = -p
    elif DIVERGENCE == _REVERSE_KL:
        value = q * (log_q - log_p)
        G = value
    elif DIVERGENCE == _JS:
        log_m = tl.log(tl.maximum(parameter * p + (1.0 - parameter) * q, 1.1754944e-38))
        G = (1.0 - parameter) * q * (log_q - log_m)
        value = parameter * p * (log_p - log_m) + G
    elif DIVERGENCE == _SKEWED_FORWARD_KL:
        m = tl.maximum(parameter * p + (1.0 - parameter) * q, 1.1754944e-38)
        value = p * (log_p - tl.log(m))
        G = (parameter - 1.0) * p * (q / m)
    elif DIVERGENCE == _SKEWED_REVERSE_KL:
        m = tl.maximum((1.0 - parameter) * p + parameter * q, 1.1754944e-38)
        value = q * (log_q - tl.log(m))
        G = value - parameter * q * (q / m)
    elif DIVERGENCE == _ADAPTIVE_KL:
        reverse = q * (log_q - log_p)
        value = weight * p * (log_p - log_q) + (1.0 - weight) * reverse
        G = (1.0 - weight) * reverse - weight * p
    else:
        tl.static_assert(DIVERGENCE == _TVD)
        value = 0.5 * tl.abs(q - p)
        G = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0)) * q
    return value, G


@triton.jit
def _rows(
    z_pointer,  # [n, V] the logits that learn: gradients are written over them
    u_pointer,  # [n, V] the logits that teach (PAIRED); with SOURCE_CE gradients go over them
    z_stride,
    u_stride,
    label_pointer,  # [n]
    target_pointer,  # [n] labels of u
    out_pointer,  # [4, n] ce, source_ce, divergence, correct
    n,
    V,
    scale,
    softcap,
    u_scale,
    u_softcap,
    T,
    ce_weight,
    source_weight,
    divergence_weight,
    parameter,
    log_floor,  # log(parameter / V)
    DIVERGENCE: tl.constexpr,
    PAIRED: tl.constexpr,
    CE: tl.constexpr,
    SOURCE_CE: tl.constexpr,
    MASK_WRONG: tl.constexpr,
    SOFTCAP: tl.constexpr,
    U_SOFTCAP: tl.constexpr,
    BISECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_pointer + row * z_stride
    u_row = u_pointer + row * u_stride
    label = tl.load(label_pointer + row)
    target = tl.load(target_pointer + row)
    infinity = float("inf")

    # Maxima, sums of exponentials at temperature 1 and T, the labels' logits.
    z_max, z_sum, z_sum_T, z_label = -infinity, 0.0, 0.0, 0.0
    u_max, u_sum, u_sum_T, u_label = -infinity, 0.0, 0.0, 0.0
    ratio = 0.0  # the mean of (u - z) / T under p, times u_sum_T
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < V
        z = _logits(z_row, at, inside, scale, softcap, SOFTCAP)
        new = tl.maximum(z_max, tl.max(z, 0))
        z_sum_T = z_sum_T * tl.exp((z_max - new) / T) + tl.sum(tl.exp((z - new) / T), 0)
        if CE:
            z_sum = z_sum * tl.exp(z_max - new) + tl.sum(tl.exp(z - new), 0)
            z_label += tl.sum(tl.where(at == label, z, 0.0), 0)
        z_max = new
        if PAIRED:
            u = _logits(u_row, at, inside, u_scale, u_softcap, U_SOFTCAP)
            u_label += tl.sum(tl.where(at == target, u, 0.0), 0)
            new = tl.maximum(u_max, tl.max(u, 0))
            before, weights = tl.exp((u_max - new) / T), tl.exp((u - new) / T)
            u_sum_T = u_sum_T * before + tl.sum(weights, 0)
            if DIVERGENCE == _FORWARD_KL:
                difference = tl.where(inside, (u - z) / T, 0.0)
                ratio = ratio * before + tl.sum(weights * difference, 0)
            if SOURCE_CE:
                u_sum = u_sum * tl.exp(u_max - new) + tl.sum(tl.exp(u - new), 0)
            u_max = new
    if CE:
        counted = tl.where(label == -100, 0.0, 1.0)
        tl.store(out_pointer + row, counted * (z_max - z_label + tl.log(z_sum)))
        ce_weight = ce_weight * counted

    share = 0.0
    G_sum = 0.0
    mix = 0.0
    if PAIRED:
        z_log = tl.log(z_sum_T)
        u_log = tl.log(u_sum_T)
        correct = tl.where((u_label >= u_max) & (target != -100), 1.0, 0.0)
        share = divergence_weight / T
        agreeing = tl.where(target == -100, 1.0, correct)
        if MASK_WRONG:
            share = share * agreeing
        if SOURCE_CE:
            counted = tl.where(target == -100, 0.0, 1.0)
            tl.store(out_pointer + n + row, counted * (u_max - u_label + tl.log(u_sum)))
            source_weight = source_weight * counted

        if DIVERGENCE == _ADAPTIVE_KL:
            above = 1e-3 - u_log  # the largest log p is -u_log
            below = tl.minimum(above, log_floor)
            for _bisection in range(BISECTIONS):
                middle = (below + above) / 2
                mass = 0.0
                for start in range(0, V, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    u = _logits(u_row, at, at < V, u_scale, u_softcap, U_SOFTCAP)
                    log_p = (u - u_max) / T - u_log
                    mass += tl.sum(tl.where(log_p < middle, tl.exp(log_p), 0.0), 0)
                in_tail = mass <= parameter
                below = tl.where(in_tail, middle, below)
                above = tl.where(in_tail, above, middle)
            total = 0.0
            head = 0.0
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                inside = at < V
                z = _logits(z_row, at, inside, scale, softcap, SOFTCAP)
                u = _logits(u_row, at, inside, u_scale, u_softcap, U_SOFTCAP)
                log_p = (u - u_max) / T - u_log
                gap = tl.abs(tl.exp(log_p) - tl.exp((z - z_max) / T - z_log))
                total += tl.sum(gap, 0)
                head += tl.sum(tl.where(log_p >= below, gap, 0.0), 0)
            mix = tl.where(total > 0.0, head / tl.maximum(total, 1e-30), 0.5)

        value = 0.0
        if DIVERGENCE == _FORWARD_KL:
            value = ratio / u_sum_T + ((z_max - u_max) / T + z_log - u_log)
            G_sum = -1.0
        else:
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                inside = at < V
                z = _logits(z_row, at, inside, scale, softcap, SOFTCAP)
                u = _logits(u_row, at, inside, u_scale, u_softcap, U_SOFTCAP)
                log_q = tl.where(inside, (z - z_max) / T - z_log, 0.0)
                log_p = tl.where(inside, (u - u_max) / T - u_log, 0.0)
                q = tl.where(inside, tl.exp(log_q), 0.0)
                p = tl.where(inside, tl.exp(log_p), 0.0)
                v, G = _value_and_G(log_p, log_q, p, q, parameter, mix, DIVERGENCE)
                value += tl.sum(v, 0)
                G_sum += tl.sum(G, 0)
        if MASK_WRONG:
            value = value * agreeing
        tl.store(out_pointer + 2 * n + row, value)
        tl.store(out_pointer + 3 * n + row, correct)

    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < V
        z = _logits(z_row, at, inside, scale, softcap, SOFTCAP)
        grad = tl.zeros((BLOCK,), tl.float32)
        if CE:
            grad += ce_weight * (tl.exp(z - z_max) / z_sum - tl.where(at == label, 1.0, 0.0))
        if PAIRED:
            u = _logits(u_row, at, inside, u_scale, u_softcap, U_SOFTCAP)
            log_q = tl.where(inside, (z - z_max) / T - z_log, 0.0)
            log_p = tl.where(inside, (u - u_max) / T - u_log, 0.0)
            q = tl.exp(log_q)
            p = tl.exp(log_p)
            _value, G = _value_and_G(log_p, log_q, p, q, parameter, mix, DIVERGENCE)
            grad += share * (G - q * G_sum)
            if SOURCE_CE:
                u_grad = tl.exp(u - u_max) / u_sum - tl.where(at == target, 1.0, 0.0)
                u_grad = source_weight * u_grad
                _store(u_row, at, inside, u, u_grad, u_scale, u_softcap, U_SOFTCAP)
        _store(z_row, at, inside, z, grad, scale, softcap, SOFTCAP)


def pair_terms(
    learner: Tensor,
    source: Tensor | None,
    labels: Tensor | None,
    source_labels: Tensor,
    heads: tuple[OutputHead, OutputHead],
    divergence: Divergence,
    weights: Weights,
) -> PairTerms:
    """As `elementwise.pair_terms`, for float32 and narrower."""
    n, V = learner.shape
    out = learner.new_zeros((4, n), dtype=torch.float32)
    if not n:
        return PairTerms(*out.unbind(0))
    u = learner if source is None else source
    parameter = divergence.parameter or 0.5
    _rows[(n,)](
        learner,
        u,
        learner.stride(0),
        u.stride(0),
        source_labels if labels is None else labels,
        source_labels,
        out,
        n,
        V,
        heads[0].scale,
        heads[0].softcap or 1.0,
        heads[1].scale,
        heads[1].softcap or 1.0,
        weights.temperature,
        weights.ce,
        weights.source_ce,
        weights.divergence,
        parameter,
        math.log(parameter / V),
        DIVERGENCE=_CODES[divergence.name],
        PAIRED=source is not None,
        CE=labels is not None,
        SOURCE_CE=weights.source_ce != 0,
        MASK_WRONG=weights.mask_wrong,
        SOFTCAP=heads[0].softcap is not None,
        U_SOFTCAP=heads[1].softcap is not None,
        BISECTIONS=_BISECTIONS,
        BLOCK=min(_BLOCK, triton.next_power_of_2(V)),
        num_warps=_WARPS,
    )
    return PairTerms(*out.unbind(0))
