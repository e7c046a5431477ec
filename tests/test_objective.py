"""The two players: what is minimised is few kept patches, and the multiplier rises while the constraint is broken."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.objective import (
    Multiplier,
    class_margin,
    expected_l0,
    kl_divergence,
    kl_to_change,
    lagrangian,
    mask_embeddings,
)
from vdm_utils.training import DiffMaskSettings, DiffMaskTrainer, settings


def test_masked_embeddings_by_hand():
    embeddings = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    mask, placeholder = torch.tensor([[1.0, 0.0, 0.25]]), torch.tensor([-1.0, 10.0])
    assert mask_embeddings(embeddings, mask, placeholder).tolist() == [[[1, 2], [-1, 10], [0.5, 9.0]]]


def test_kl_is_that_of_torch_and_in_this_order():
    logits, masked = 3 * torch.randn(50, 10), 3 * torch.randn(50, 10)
    expected = torch_kl(Categorical(logits=logits), Categorical(logits=masked))
    assert torch.allclose(kl_divergence(logits, masked), expected, atol=1e-5)
    assert not torch.allclose(kl_divergence(masked, logits), expected, atol=0.1)
    assert (kl_divergence(logits, logits + 5) < 1e-6).all() and (kl_divergence(logits, masked) >= 0).all()
    sure = torch.tensor([[1e4, -1e4]])
    assert kl_divergence(sure, sure).item() == 0 and kl_divergence(sure, -sure).item() == pytest.approx(2e4)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_divergence(torch.tensor([[0.75, 0.25]]).log(), torch.zeros(1, 2)).item() == pytest.approx(by_hand)


def test_below_the_kl_to_change_no_answer_has_another_class():
    """Of 300,000 other answers near to each of twenty: none with another class is cheaper, and some are hardly dearer."""
    logits = torch.randn(20, 5)
    bound = kl_to_change(logits)
    others = logits[:, None] + torch.linspace(0.01, 3, 300_000)[:, None] * torch.randn(20, 300_000, 5)
    kl = kl_divergence(logits[:, None], others)
    kl[others.argmax(-1) == logits.argmax(-1)[:, None]] = math.inf
    nearest = kl.min(1).values
    assert (nearest > bound).all() and ((nearest - bound) < 0.02 + 0.2 * bound).all() and bound.max() > 0.1


def test_kl_to_change_by_hand():
    answers = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.5, 1e-9], [1.0, 1e-9, 1e-9]])
    by_hand = 0.6 * math.log(0.6 / 0.45) + 0.3 * math.log(0.3 / 0.45)
    assert kl_to_change(answers.log()).tolist() == pytest.approx([by_hand, 0, math.log(2)], abs=1e-6)
    assert class_margin(answers.log()).tolist() == pytest.approx(
        [1 + math.log(by_hand / math.log(2)) / 2, -1, 1], abs=1e-5
    )


def test_a_picture_on_the_edge_of_another_class_has_a_smaller_budget(base, pictures):
    """Price and broken promise are those of KL · ε / budget; and without `keep_class` those of KL, whatever the answer."""
    budgets = {}
    for keep_class in (False, True):
        torch.manual_seed(0)
        diffmask, _ = players(base, "log", keep_class=keep_class, eps=0.4)
        torch.manual_seed(1)
        output = diffmask(pictures, layer=2)
        output.loss.backward()
        limit = kl_to_change(base(pictures).logits).clamp(0.04, 0.4) if keep_class else torch.full((8,), 0.4)
        cost = (output.kl * 0.4 / limit).mean().item()
        assert diffmask.multiplier.parameter.grad[2].item() == pytest.approx(cost - 0.4, rel=1e-4)
        value = output.l0.mean().item() + diffmask.multiplier.value[2].item() * (cost - 0.4)
        assert output.loss.item() == pytest.approx(value, rel=1e-4)
        budgets[keep_class] = limit
    assert (budgets[True] < 0.39).any() and (budgets[True] > 0.041).any()


def test_sparsity_is_a_probability_and_not_its_logarithm():
    probability = torch.tensor([[0.5, 0.25, 0.0], [1.0, 1.0, 0.25]])
    assert expected_l0(probability.log()).tolist() == pytest.approx([0.25, 0.75])  # the mean log would be -inf


def test_lagrangian_by_hand():
    assert lagrangian(0.5, 0.3, 20.0, 0.1) == pytest.approx(4.5)
    assert lagrangian(0.5, 0.05, 20.0, 0.1) == pytest.approx(-0.5)


# ---------------------------------------------------------------- the multiplier


KINDS = {"log": {"log_multiplier": True, "alpha": 10.0, "alpha_min": 1.0}, "plain": {"alpha": 20.0}}


def players(base, kind, **more):
    options = KINDS[kind] | {"normalize": True, "add_activation": 0.0, "mul_activation": 3.0} | more
    diffmask = VisionDiffMask.for_classifier(base, **options)
    return diffmask, DiffMaskTrainer.make_optimizer(diffmask, settings(DiffMaskSettings, "quick"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eps", "rises"), [(1e-4, True), (1e3, False)])
def test_one_optimizer_step_moves_both_players_the_right_way(base, pictures, kind, eps, rises):
    diffmask, optimizer = players(base, kind, eps=eps)
    before = diffmask.multiplier.value.clone()
    gates = [gate.outer.weight.detach().clone() for gate in diffmask.gates]
    output = diffmask(pictures, layer=3)
    assert (output.kl.mean() > eps) == rises
    output.loss.backward()
    optimizer.step()
    moved = diffmask.multiplier.value - before
    assert (moved[3] > 0) == rises and moved[3] != 0
    assert moved[[0, 1, 2, 4, 5]].count_nonzero() == 0  # only the layer that was drawn
    changed = [not torch.equal(gate.outer.weight, old) for gate, old in zip(diffmask.gates, gates)]
    assert changed == [True] * 4 + [False] * 2  # the votes that were used


def test_a_price_keeps_its_momentum_after_its_layer_was_drawn(base, pictures):
    """All prices are one parameter: seldom drawn, each still moves about as fast as if it were drawn at every step."""
    diffmask, optimizer = players(base, "log", eps=1e-4)
    path = []
    for layer in (0, 1, 1):
        optimizer.zero_grad()
        diffmask(pictures, layer=layer).loss.backward()
        optimizer.step()
        path.append(diffmask.multiplier.value[0].item())
    assert path[0] < path[1] < path[2]


@pytest.mark.parametrize("kind", KINDS)
def test_one_backward_pass_gives_both_gradients(base, pictures, kind):
    diffmask, _ = players(base, kind)
    parameters = [*diffmask.gates.parameters(), diffmask.placeholder]
    torch.manual_seed(1)
    output = diffmask(pictures, layer=5)
    output.loss.backward()
    torch.manual_seed(1)  # the same gates again: the Lagrangian by hand
    states = diffmask.view.encode(pictures)
    votes = diffmask.votes(states)
    kl = kl_divergence(states.logits, diffmask.masked_logits(pictures, states, votes.rsample().prod(1))).mean()
    sparsity = votes.prob_nonzero.prod(1).mean()
    alpha = KINDS[kind]["alpha"]
    by_hand = sparsity + alpha * (kl - 0.1)
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert output.l0.mean().item() == pytest.approx(sparsity.item(), rel=1e-5)
    for parameter, expected in zip(parameters, torch.autograd.grad(by_hand, parameters)):
        assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=1e-6)
    violation = kl.item() - 0.1  # the ascent direction: of KL − ε, for the drawn layer alone
    assert diffmask.multiplier.parameter.grad.tolist() == pytest.approx([0] * 5 + [violation], rel=1e-4)


def test_a_quantile_of_the_batch_can_be_held_instead_of_its_mean(base, pictures):
    diffmask, _ = players(base, "log", kl_quantile=0.75)
    output = diffmask(pictures, layer=2)
    output.loss.backward()
    expected = output.kl.quantile(0.75).item() - 0.1
    assert diffmask.multiplier.parameter.grad[2].item() == pytest.approx(expected, rel=1e-4)
    assert output.kl.mean().item() - 0.1 != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("log_space", [True, False])
def test_multipliers_start_where_asked_and_stay_in_bounds(log_space):
    multiplier = Multiplier(3, start=10.0, minimum=0.5, maximum=200.0, log_space=log_space)
    assert multiplier.value.tolist() == pytest.approx([10.0] * 3)
    with torch.no_grad():
        multiplier.parameter += torch.tensor([-1e3, 0.0, 1e3])
    multiplier.clamp_()
    assert multiplier.value.tolist() == pytest.approx([0.5, 10.0, 200.0])
    assert not multiplier.value.requires_grad


@pytest.mark.parametrize(
    ("bounds", "log_space"), [((5, 0, 1), False), ((1, 2, 3), False), ((1, -1, 3), False), ((1, 0, 3), True)]
)
def test_impossible_bounds_are_refused(bounds, log_space):
    with pytest.raises(ValueError, match="minimum <= start <= maximum"):
        Multiplier(2, *bounds, log_space=log_space)
