"""Each objective against its paper's formula, on numbers that fit on a page."""

import math

import pytest
import torch

from common.losses import (
    REBRAC,
    average,
    awr_loss,
    bc_q_loss,
    expectile_loss,
    explained_variance,
    mse,
    rebrac_actor_loss,
    rebrac_betas,
)

MASK = torch.tensor([1.0, 1.0, 0.0])


def test_rebrac_is_its_formula_and_td3bc_in_other_units():
    pi, action, q = torch.tensor([[0.5, 0.0], [1.0, 1.0]]), torch.zeros(2, 2), torch.tensor([10.0, -30.0])
    loss, info = rebrac_actor_loss(pi, action, q, beta=0.1)
    assert loss.item() == pytest.approx(0.1 * (0.25 + 2.0) / 2 - (-10.0 / 20.0))
    # the penalty sums over action dims, TD3+BC's averages: alpha = 1 / (beta * A), times the loss's scale
    same, _ = bc_q_loss(pi, action, q, alpha=1 / (0.1 * 2))
    assert loss.item() == pytest.approx(0.1 * 2 * same.item())
    assert info["q_pi"].item() == -10


def test_expectile_is_asymmetric():
    value = torch.tensor([0.0, 0.0])
    assert expectile_loss(value, torch.tensor([2.0, 2.0]), 0.7).item() == pytest.approx(0.7 * 4)
    assert expectile_loss(value, torch.tensor([-2.0, -2.0]), 0.7).item() == pytest.approx(0.3 * 4)
    targets, v = torch.tensor([0.0, 1.0, 2.0, 10.0]), torch.linspace(0, 10, 2001)
    best = v[torch.stack([expectile_loss(x.expand(4), targets, 0.9) for x in v]).argmin()]
    assert best.item() == pytest.approx(7.75, abs=0.01)


def test_advantage_weighted_cloning():
    pi, action = torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
    loss, info = awr_loss(pi, action, torch.tensor([0.0, 1.0]), temperature=3.0)
    assert loss.item() == pytest.approx((1 + math.exp(3)) / 2)
    assert awr_loss(pi, action, torch.tensor([0.0, 100.0]), 3.0)[0].item() == pytest.approx((1 + 100) / 2)  # the cap
    assert info["bc_loss"].item() == 1


def test_a_masked_row_counts_nothing():
    g = torch.Generator().manual_seed(0)
    pi, action, q, v = (torch.randn(3, *s, generator=g) for s in [(2,), (2,), (), ()])
    cut = lambda *xs: [x[:2] for x in xs]  # noqa: E731
    for masked, plain in [
        (bc_q_loss(pi, action, q, 2.5, MASK)[0], bc_q_loss(*cut(pi, action, q), 2.5)[0]),
        (rebrac_actor_loss(pi, action, q, 0.1, 1.0, MASK)[0], rebrac_actor_loss(*cut(pi, action, q), 0.1)[0]),
        (expectile_loss(v, q, 0.7, MASK), expectile_loss(*cut(v, q), 0.7)),
        (awr_loss(pi, action, q, 3.0, MASK)[0], awr_loss(*cut(pi, action, q), 3.0)[0]),
        (mse(pi, action, MASK), mse(*cut(pi, action), None)),
        (average(q, MASK), q[:2].mean()),
        (explained_variance(v, q, MASK), explained_variance(*cut(v, q))),
    ]:
        torch.testing.assert_close(masked, plain)


def test_explained_variance():
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target, target) == 1
    assert explained_variance(torch.full((3,), 2.0), target) == 0
    assert explained_variance(-target, target) < 0


def test_published_penalties():
    assert rebrac_betas("hopper", "medium") == (0.01, 0.01) and rebrac_betas("walker2d", "expert") == (0.01, 0.5)
    assert rebrac_betas("Pendulum-v1", "medium") == (0.01, 0.01)
    assert all(len(kinds) == 6 for kinds in REBRAC.values())
