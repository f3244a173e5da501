"""The Triton kernel against the PyTorch form; and that it compiles.

On a machine with a GPU these run there. On others Triton interprets its kernels, which must be
said before anything imports it: one test runs this file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

pytest.importorskip("triton")

from axolotl_dskd.config import DivergenceName
from axolotl_dskd.losses import elementwise, make_divergence
from axolotl_dskd.output_head import OutputHead

NAMES = get_args(DivergenceName)
V = 97
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="runs in the interpreter's process"
)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run as they are")
def test_the_kernel_tests_pass_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-3000:]
    assert "passed" in out.stdout


@pytest.fixture
def kernels(monkeypatch):
    """The kernels in blocks that do not divide the vocabulary."""
    from axolotl_dskd.losses import kernels

    monkeypatch.setattr(kernels, "_BLOCK", 64)
    return kernels


def inputs(dtype: torch.dtype, scale: float = 2.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    z, u = (scale * torch.randn(4, V, generator=generator) for _ in range(2))
    labels = torch.randint(V, (4,), generator=generator)
    labels[::2] = u.argmax(-1)[::2]
    targets = labels.clone()
    targets[1] = -100
    return z.to(DEVICE, dtype), u.to(DEVICE, dtype), labels.to(DEVICE), targets.to(DEVICE)


def compare(kernels, weights, divergence, head, dtype, scale=2.0, tolerance=4e-6) -> None:
    z, u, labels, targets = inputs(dtype, scale)
    other_head = replace(head, scale=1.5 * head.scale)
    results = []
    for module in (elementwise, kernels):
        student, projected = z.clone(), u.clone()
        terms = module.pair_terms(
            student, projected, labels, targets, (head, other_head), divergence, weights
        )
        results.append([*terms, student, projected])
    for ours, reference in zip(*reversed(results), strict=True):
        assert torch.isfinite(ours).all()
        gap = (ours.double() - reference.double()).abs().max()
        assert gap <= tolerance * max(1.0, float(reference.abs().max()))


@runs_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_kernel_equals_the_reference(kernels, name: str, softcap: float | None):
    head = OutputHead(torch.zeros(V, 4), scale=0.5, softcap=softcap)
    for mask_wrong, temperature in ((False, 1.0), (True, 2.5)):
        weights = elementwise.Weights(0.5, 0.3, 0.7, temperature, mask_wrong)
        compare(kernels, weights, make_divergence(name), head, torch.float32)


@runs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_finite_for_extreme_logits(kernels, name: str):
    head = OutputHead(torch.zeros(V, 4))
    weights = elementwise.Weights(0.5, 0.3, 0.7, 2.0)
    compare(kernels, weights, make_divergence(name), head, torch.float32, scale=1e4)


@runs_kernels
def test_the_kernel_writes_bfloat16_gradients(kernels):
    head = OutputHead(torch.zeros(V, 4))
    weights = elementwise.Weights(0.5, 0.3, 0.7, 2.0)
    compare(kernels, weights, make_divergence("js_divergence"), head, torch.bfloat16, 2.0, 2**-8)


def says_its_labels(module) -> torch.Tensor:
    """`correct` where the largest logit is the label's, another one's, both; and without label."""
    u = torch.zeros(4, V, device=DEVICE)
    u[0, 5], u[1, 6] = 2.0, 2.0
    u[2, [3, 5]] = 2.0
    labels = torch.tensor([5, 5, 5, -100], device=DEVICE)
    head = OutputHead(torch.zeros(V, 4))
    weights = elementwise.Weights(0.0, 0.0, 1.0, 1.0)
    z, divergence = u.clone(), make_divergence("forward_kl")
    return module.pair_terms(z, u, None, labels, (head, head), divergence, weights).correct


def test_a_label_that_no_token_is_more_likely_than_is_right():
    assert says_its_labels(elementwise).tolist() == [1, 0, 1, 0]


@runs_kernels
def test_the_kernel_takes_a_label_among_equals_for_right(kernels):
    assert says_its_labels(kernels).tolist() == [1, 0, 1, 0]


@runs_kernels
def test_the_kernel_equals_the_reference_over_the_teachers_vocabulary(kernels):
    head = OutputHead(torch.zeros(V, 4), softcap=7.0)
    weights = elementwise.Weights(0.0, 0.0, 0.7, 2.0)
    z, u, labels, _ = inputs(torch.float32)
    results = []
    for module in (elementwise, kernels):
        projected = z.clone()
        source = u.clone()
        terms = module.pair_terms(
            projected,
            source,
            None,
            labels,
            (head, head),
            make_divergence("forward_kl"),
            weights,
        )
        assert torch.equal(source, u)
        results.append([*terms, projected])
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)


@runs_kernels
def test_a_token_without_projection_gets_cross_entropy_alone(kernels):
    head = OutputHead(torch.zeros(V, 4))
    weights = elementwise.Weights(0.5, 0.3, 0.7, 2.0)
    z, _, labels, targets = inputs(torch.float32)
    results = []
    for module in (elementwise, kernels):
        student = z.clone()
        terms = module.pair_terms(
            student, None, labels, targets, (head, head), make_divergence("tvd"), weights
        )
        results.append([*terms, student])
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)


_COMPILE = """
import sys
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from axolotl_dskd.losses import kernels

names = kernels._rows.arg_names
flags = ("DIVERGENCE", "PAIRED", "CE", "MASK_WRONG", "SOFTCAP", "BISECTIONS", "BLOCK")
types = {"z_pointer": "*bf16", "u_pointer": "*bf16", "label_pointer": "*i64",
         "target_pointer": "*i64", "out_pointer": "*fp32", "z_stride": "i32", "u_stride": "i32",
         "n": "i32", "V": "i32"} | dict.fromkeys(flags, "constexpr")
signature = {name: types.get(name, "fp32") for name in names}
variants = [(code, True, True, True, True) for code in kernels._CODES.values()]
variants += [(0, False, True, False, False), (0, True, False, False, False)]
for variant in variants:
    values = dict(zip(flags, (*variant, 30, kernels._BLOCK)))
    source = ASTSource(kernels._rows, signature, {(names.index(k),): v for k, v in values.items()})
    compiled = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32),
                       options={"num_warps": kernels._WARPS})
    assert "ptx" in compiled.asm
print("compiled", len(variants))
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernel_compiles_for_gpus(capability: str):
    """Triton needs no GPU to compile: what its interpreter forgives fails here."""
    out = subprocess.run(
        [sys.executable, "-c", _COMPILE, capability], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "compiled 9" in out.stdout
