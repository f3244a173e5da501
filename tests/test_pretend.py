"""The accelerator that is not there sees what CUDA would refuse, and computes what CUDA would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.support.pretend import DEVICE, OtherDevice, Pretended, accelerator
from tests.support.waits import Waits


@pytest.fixture(autouse=True)
def _open() -> Iterator[None]:
    with accelerator():
        yield


def there(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE)


FAULTS: dict[str, Callable[[], object]] = {
    "a sum": lambda: there(1, 2) + torch.ones(2),
    "a sum in place": lambda: torch.ones(2).add_(there(1, 2)),
    "a product": lambda: torch.ones(3, 2) @ there(1, 2),
    "an index": lambda: there(1, 2)[torch.tensor([0])],
    "an index of the CPU's": lambda: torch.ones(2)[there(0).long()],
    "a mask": lambda: there(1, 2)[torch.tensor([True, False])],
    "a mask that is filled": lambda: there(1, 2).masked_fill(torch.tensor([True, False]), 0),
    "rows that are set": lambda: there(1, 2).index_put_((torch.tensor([0]),), there(3)),
    "a table": lambda: torch.ones(2).gather(0, there(1).long()),
    "numbers put together": lambda: torch.stack([there(1)[0], torch.tensor(1.0)]),
    "lists": lambda: torch.cat([there(1), torch.ones(1)]),
    "a result": lambda: torch.mm(there(1)[None], there(1)[None], out=torch.empty(1, 1)),
    "a generator": lambda: torch.rand(2, device=DEVICE, generator=torch.Generator()),
    "a generator of drawn rows": lambda: there(1, 2).multinomial(1, generator=torch.Generator()),
    "a layer": lambda: nn.Linear(2, 2)(there(1, 2)),
    "an early reader": lambda: there(1, 2).to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_two_devices_in_one_operation_are_seen(fault: str):
    with pytest.raises(OtherDevice, match="aten"):
        FAULTS[fault]()


def test_two_devices_in_backward_are_seen():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * torch.full((2,), 2.0)

    x = there(1, 2).requires_grad_()
    loss = Doubled.apply(x).sum()
    with pytest.raises(OtherDevice, match="mul"):
        loss.backward()


def test_numbers_and_copies_may_come_from_the_cpu():
    x = there(1, 2)
    for made in (x * torch.tensor(2.0), torch.where(x > 1, x, torch.tensor(0.0)), x.fill_(3)):
        assert made.device == DEVICE
    assert x.copy_(torch.ones(2)).tolist() == [1, 1]
    assert torch.zeros(2).copy_(x).tolist() == [1, 1]
    assert [type(y) for y in (x.cpu(), x.to("cpu"), torch.ones(1).to(x))] == [
        Tensor,
        Tensor,
        Pretended,
    ]
    with pytest.raises(TypeError):
        x.numpy()


def test_tensors_are_made_where_they_are_asked_for():
    x = there(1, 2)
    made = [torch.arange(2, device=x.device), x.new_zeros(3), torch.rand_like(x), x.long()]
    made += [torch.as_tensor([1], device=x.device), x.new_tensor([1]), torch.full((2,), 1).to(x)]
    assert {(type(y), y.device) for y in made} == {(Pretended, DEVICE)}
    assert type(torch.zeros(2)) is Tensor


def test_views_are_written_through():
    x = torch.zeros(3, 2, device=DEVICE)
    first, rest = x.split([1, 2])
    first.fill_(1)
    rest[1, 1] = 2
    x.view(-1)[2] = 3
    assert x.tolist() == [[1, 1], [3, 0], [0, 2]]


def test_a_network_learns_as_on_the_cpu():
    def trained(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(3):
            loss = net(torch.arange(6.0).view(2, 3).to(device)).log_softmax(-1)[:, 0].sum()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert {p.device for p in net.parameters()} == {device}
        return [p.detach().cpu() for p in net.parameters()]

    expected, found = trained(torch.device("cpu")), trained(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_waits_are_counted_here_too():
    x = there(1, 2)
    with Waits() as waits:
        x.sum().item()
        x.tolist()
        (x > 1).nonzero()
    assert waits.count == 3
    with Waits() as waits:
        x.cpu()
        torch.ones(1).copy_(x[:1])
        torch.ones(1).to(DEVICE)
        torch.tensor([1], device=DEVICE)
        x.new_tensor([1])
    assert waits.count == 5
    with Waits() as waits:
        torch.ones(1).to(DEVICE, non_blocking=True)
        x.copy_(torch.ones(2), non_blocking=True)
        torch.full((1,), 2.0, device=DEVICE)
        x.to(torch.float64) + x
    assert waits.count == 0
