"""`OutputHead` and head capture, for every family that treats its logits differently."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl_dskd.models.heads import (
    captured_head_input,
    check_output_head,
    gated,
    output_head,
    single,
)
from axolotl_dskd.output_head import Gate
from tests.support.families import CONFIGS, build


def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_captured_states_gives_the_models_logits(name: str):
    model = build(name)
    expected = model(input_ids=ids()).logits
    with captured_head_input(model) as captured:
        out = model(input_ids=ids())
    hidden = single(captured, model)
    assert out.logits.shape == (2, 9, 1)  # nobody computed logits over the vocabulary
    torch.testing.assert_close(output_head(model).logits(hidden), expected)
    torch.testing.assert_close(model(input_ids=ids()).logits, expected)  # and nothing stays behind


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_accepts_every_family(name: str):
    check_output_head(build(name), "student")


def test_the_check_refuses_a_model_that_changes_its_logits_in_another_way():
    model = build("llama")
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(ValueError, match=r"teacher's output head.*does not know"):
        check_output_head(model, "teacher")


def test_the_check_refuses_a_damaged_model():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"logits that are not finite.*damaged"):
        check_output_head(model, "teacher")


def test_projector_sizes_come_from_the_head_not_from_the_config():
    assert output_head(build("opt_projected")).hidden_size == 16


@pytest.mark.parametrize("tie", [False, True])
def test_gradients_reach_the_models_own_parameters(tie: bool):
    model = build("llama_tied" if tie else "llama")
    with captured_head_input(model) as captured:
        model(input_ids=ids())
    output_head(model).logits(single(captured, model)).square().sum().backward()
    assert model.get_output_embeddings().weight.grad is not None
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_lora_on_the_head_is_part_of_it():
    model = build("llama")
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "lm_head"])
    ).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = peft(input_ids=ids()).logits
    with captured_head_input(peft) as captured:
        peft(input_ids=ids())
    head = output_head(peft)
    assert head.lora_A is not None
    assert head.trainable
    torch.testing.assert_close(head.logits(single(captured, peft)), expected)


def test_a_head_saved_as_module_is_the_trained_copy():
    peft = get_peft_model(
        build("llama"),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    expected = peft(input_ids=ids()).logits
    with captured_head_input(peft) as captured:
        peft(input_ids=ids())
    head = output_head(peft)
    assert head.trainable
    torch.testing.assert_close(head.logits(single(captured, peft)), expected)


def test_lora_elsewhere_leaves_the_head_frozen():
    peft = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    assert not output_head(peft).trainable


def test_dora_on_the_head_is_refused():
    peft = get_peft_model(
        build("llama"), LoraConfig(r=4, target_modules=["lm_head"], use_dora=True)
    )
    with pytest.raises(ValueError, match="DoRA"):
        output_head(peft)


def test_a_four_bit_head_is_read_as_its_dequantised_weight():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = build("llama")
    linear = bnb.nn.Linear4bit(32, 97, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.load_state_dict({"weight": model.lm_head.weight.detach().clone()}, strict=False)
    model.lm_head = linear.to("cpu")
    model.lm_head(torch.zeros(1, 32))  # quantises on first use where it did not when moved
    expected = model(input_ids=ids()).logits
    with captured_head_input(model) as captured:
        model(input_ids=ids())
    found = output_head(model).logits(single(captured, model))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_padding_rows_are_cut_off():
    head = output_head(build("llama"), vocab_size=90)
    assert head.logits(torch.randn(3, 32)).shape == (3, 90)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no output embedding"):
        output_head(build("llama").model)


def test_a_forward_that_never_calls_its_head_is_refused():
    model = build("llama")
    with captured_head_input(model) as captured:
        model.model(input_ids=ids())
    with pytest.raises(ValueError, match="0 times"):
        single(captured, model)


def test_capture_takes_the_dtype_of_autocast():
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16), captured_head_input(model) as captured:
        model(input_ids=ids())
    assert single(captured, model).dtype == torch.bfloat16


def test_capture_keeps_a_forward_that_stood_on_the_instance():
    """accelerate puts its device hooks there."""
    model = build("llama")
    expected = model(input_ids=ids()).logits
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x) + 1.0
    with captured_head_input(model):
        model(input_ids=ids())
    torch.testing.assert_close(model(input_ids=ids()).logits, expected + 1.0)


def test_a_gate_takes_the_dtype_of_autocast():
    """A student that writes with virtual attention, in mixed precision."""
    model = build("llama")
    ids_of_groups = tuple(torch.arange(97)[k::2] for k in range(2))
    gate = Gate(torch.ones(2, 4), ids_of_groups)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(input_ids=ids()).logits
        with gated(model, gate):
            found = model(input_ids=ids()).logits
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_a_float32_head_on_a_bfloat16_body_is_checked_under_autocast():
    model = build("llama").bfloat16()
    for module in (model.lm_head, model.model.norm, model.model.embed_tokens):
        module.float()
    with torch.autocast("cpu", torch.bfloat16):
        check_output_head(model, "student")


@pytest.fixture
def single_rank(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("find_unused", [False, True])
def test_a_trained_head_is_no_surprise_to_ddp(single_rank, find_unused: bool, tie: bool):
    """The loss uses the head's parameters outside the forward that DDP watches."""
    model = build("llama_tied" if tie else "llama").train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    for step in range(3):
        with captured_head_input(model) as captured:
            out = wrapped(input_ids=ids())
        if step == 1:  # a batch without supervised tokens
            loss = out.logits.sum() * 0.0
        else:
            loss = output_head(model).logits(single(captured, model)).square().mean()
        loss.backward()
        assert model.lm_head.weight.grad is not None
        model.zero_grad()
