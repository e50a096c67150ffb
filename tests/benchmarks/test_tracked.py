"""``benchmarks.common.tracked``: allocations counted by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.tracked import Tracked


def test_a_known_sequence():
    before = torch.zeros(10, 10)
    with Tracked() as t:
        a = torch.zeros(100)  # 400 bytes
        b = a.view(10, 10)
        c = b @ before  # 800
        assert t.current == 800
        del c
        b.add_(1)
        before.t().mul_(2)
        assert t.current == 400
        e = torch.cat([b, b, b])  # 1,600
        del a, b
        assert t.current == 1200
        f = e[:2].clone()  # 80
        del e
        assert t.current == 80
        g = torch.empty(0)
        g.resize_(30)  # 200
    assert (t.peak, t.current) == (1600, 200)
    assert [(a.op.split(" > ")[0], a.shape, a.bytes, a.order) for a in t.allocations] == [
        ("aten::zeros", (100,), 400, 0),
        ("aten::mm", (10, 10), 400, 1),
        ("aten::cat", (30, 10), 1200, 2),
        ("aten::clone", (2, 10), 80, 3),
        ("aten::resize_", (30,), 120, 4),
    ]
    assert {a.dtype for a in t.allocations} == {torch.float32}
    peak, held = t.peak_of()
    assert peak == t.peak and [a.order for a in held] == [2, 0]
    assert t.peak_of(lambda a: a.order in (1, 3))[0] == 400
    del f, g
    assert t.current == 0


def test_backward_passes_and_what_operators_allocate_on_their_way():
    x = torch.randn(50, 40, requires_grad=True)
    with Tracked() as t:
        x.logsumexp(-1).sum().backward()
    # logsumexp subtracts the maximum out of place; its backward does sub, exp and mul, the last one being x.grad.
    full = [a.op.split(" > ")[-1] for a in t.allocations if a.shape == (50, 40)]
    assert full == ["aten::sub.Tensor", "aten::sub.Tensor", "aten::exp", "aten::mul.Tensor"]
    assert t.current == x.grad.untyped_storage().nbytes()


@torch.library.custom_op("csm_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    scratch = x + x
    return scratch * 1


@torch.library.custom_op("csm_test::nested", mutates_args=())
def nested(x: Tensor) -> Tensor:
    return twice(torch.cat([x, x]))[:3].clone()


def test_inside_registered_operators():
    x = torch.zeros(5)
    with Tracked() as t:
        y = nested(x)
    assert [(a.op.split(" > ")[:-1], a.bytes) for a in t.allocations[:3]] == [
        (["csm_test::nested"], 40),
        (["csm_test::nested", "csm_test::twice"], 40),
        (["csm_test::nested", "csm_test::twice"], 40),
    ]
    assert len(t.allocations) == 4 and (t.peak, t.current) == (120, y.untyped_storage().nbytes())


def test_sparse_gradients():
    table = torch.zeros(1000, 4, requires_grad=True)
    with Tracked() as t:
        F.embedding(torch.tensor([1, 7, 7]), table, sparse=True).sum().backward()
    assert t.current == 3 * 8 + 3 * 16 < t.peak < 1000
