"""The closed forms of the hard concrete distribution are those of its samples; gates stay in their range."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from vdm_utils.gates import (
    GateNetwork,
    HardConcrete,
    combine_votes,
    hard_concrete_sample,
    herding_ranks,
    log_alphas,
    prob_nonzero,
)

SAMPLES = 100_000
GATES = [  # log_alpha, temperature, low, high
    *[(log_alpha, 0.2, -0.2, 1.0) for log_alpha in (-3, -0.5, 0, 0.5, 2, 5)],  # the paper's
    *[(log_alpha, 2 / 3, -0.1, 1.1) for log_alpha in (-2, 0, 2)],  # Louizos et al.
    (0, 0.05, -0.5, 1.0),
    (1, 0.05, -0.9, 1.9),
    (-1, 2.0, -0.2, 1.5),
    (1, 2.0, -1.5, 1.0),
]


@pytest.mark.parametrize(("log_alpha", "temperature", "low", "high"), GATES)
def test_closed_forms_are_those_of_the_samples(log_alpha, temperature, low, high):
    gate = HardConcrete(torch.tensor(float(log_alpha)), temperature, low, high)
    z = gate.sample((SAMPLES,))
    assert z.shape == (SAMPLES,) and z.min() >= 0 and z.max() <= 1

    def agrees(probability, share):
        spread = (probability * (1 - probability) / SAMPLES) ** 0.5
        return abs(probability - share.float().mean()) <= 4 * spread + 2e-5

    assert agrees(gate.prob_nonzero, z > 0)
    if high > 1:
        assert agrees(gate.prob_one, z == 1)
    else:
        assert gate.prob_one == 0
    assert abs(gate.mean - z.mean()) <= 4 * z.std() / SAMPLES**0.5 + 2e-4
    by_hand = 1 / (1 + math.exp(temperature * math.log(-low / high) - log_alpha))  # METHOD.md, step 4
    assert gate.prob_nonzero.item() == pytest.approx(by_hand, rel=1e-5)
    assert gate.log_prob_nonzero.item() == pytest.approx(math.log(by_hand), rel=1e-5)
    assert prob_nonzero(gate.log_alpha, temperature, low, high) == gate.prob_nonzero


@pytest.mark.parametrize("quantity", ["log_prob_nonzero", "prob_nonzero", "prob_one", "mean"])
@pytest.mark.parametrize("high", [1.0, 1.1])
def test_nothing_overflows_far_out(quantity, high):
    log_alpha = torch.tensor([-100.0, 100.0], requires_grad=True)
    value = getattr(HardConcrete(log_alpha, high=high), quantity)
    assert value.isfinite().all()
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), log_alpha)
        assert gradient.isfinite().all()
    if quantity == "log_prob_nonzero":  # still ranks patches: not -inf, and not flat where P rounds to 0
        assert value[0].item() == pytest.approx(-100 - 0.2 * math.log(0.2 / high), abs=1e-4) and gradient[0] == 1
    elif quantity != "prob_one" or high > 1:
        assert value.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_gradients_are_those_of_finite_differences():
    log_alpha = torch.tensor([-2.0, -0.3, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.8, 0.6, 0.3, 0.04], dtype=torch.float64)
    inside = hard_concrete_sample(log_alpha, u, 0.7)
    assert ((inside > 0) & (inside < 1)).all()  # away from the clamps, where there is a gradient
    assert gradcheck(lambda a: hard_concrete_sample(a, u, 0.7), log_alpha)
    for quantity in ("log_prob_nonzero", "prob_nonzero", "prob_one", "mean"):
        assert gradcheck(lambda a, q=quantity: getattr(HardConcrete(a, 0.7, -0.3, 1.2), q), log_alpha)


def test_gates_that_share_their_noise_open_in_order_and_as_often():
    log_alpha = torch.tensor([[-1.0, 0.5, 0.0], [2.0, -2.0, 1.0]])
    gate = HardConcrete(log_alpha)
    z = gate.rsample((SAMPLES,), shared=1)  # [S, 2, 3]: one number for each row of three
    probability = gate.prob_nonzero
    spread = (probability * (1 - probability) / SAMPLES) ** 0.5
    assert ((z > 0).float().mean(0) - probability).abs().max() <= 4 * spread.max()  # each gate alone: nothing changed
    ranked = z.gather(-1, log_alpha.argsort(-1).expand_as(z))
    assert (ranked.diff(dim=-1) >= 0).all()  # together: never a lower one open and a higher one shut
    assert ((z[:, 0, 0] > 0) != (z[:, 1, 1] > 0)).any()  # rows have noise of their own
    assert (gate.rsample((SAMPLES,)).gather(-1, log_alpha.argsort(-1).expand_as(z)).diff(dim=-1) < 0).any()


def test_samples_invert_the_distribution_function():
    log_alpha = torch.randn(3, 5, requires_grad=True)
    gate = HardConcrete(log_alpha)
    torch.manual_seed(5)
    z = gate.rsample((7,))
    torch.manual_seed(5)
    u = torch.rand(7, 3, 5)
    assert z.shape == (7, 3, 5) and torch.equal(z, hard_concrete_sample(log_alpha, u))
    assert not torch.equal(z, gate.rsample((7,)))  # new noise every time
    z.sum().backward()
    assert (log_alpha.grad > 0).any() and not gate.sample().requires_grad
    inside = (z > 0.01) & (z < 0.99)  # nearer to the ends float32 has too few digits
    fraction, location = (z[inside] + 0.2) / 1.2, log_alpha.expand(7, 3, 5)[inside]
    assert inside.sum() > 20  # P(z <= t) at t = z is u again
    assert torch.allclose(torch.sigmoid(0.2 * torch.logit(fraction) - location), u[inside], atol=1e-4)


@pytest.mark.parametrize("wrong", [(0.0, -0.2, 1.0), (-1.0, -0.2, 1.0), (0.2, 0.0, 1.0), (0.2, -0.2, 0.9)])
def test_impossible_distributions_are_refused(wrong):
    with pytest.raises(ValueError, match="temperature > 0, low < 0 and high >= 1"):
        HardConcrete(torch.zeros(1), *wrong)


# ---------------------------------------------------------------- networks and votes


def gate_network(mul=15.0, add=2.0, normalize=False, zero_start=False):
    return GateNetwork(8, mul, add, normalize, zero_start)


@pytest.mark.parametrize(("mul", "add"), [(15.0, 8.0), (3.0, -1.0)])
def test_gates_stay_in_range_and_reach_its_ends(mul, add):
    network = gate_network(mul, add)
    with torch.no_grad():
        network.outer.weight *= 100
    log_alpha = network(5 * torch.randn(200, 9, 8), 5 * torch.randn(200, 9, 8))
    assert log_alpha.shape == (200, 9) and ((log_alpha - add).abs() <= mul + 1e-5).all()
    assert log_alpha.min() < add - 0.9 * mul and log_alpha.max() > add + 0.9 * mul


def test_a_gate_is_the_perceptron_of_the_paper():
    network, embeddings, hidden = gate_network(), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    (inner, inner_bias, outer, outer_bias) = network.parameters()
    assert inner.shape == (2, 16) and outer.shape == (1, 2)  # 2d → d/4 → 1
    middle = torch.tanh(torch.cat([embeddings, hidden], -1) @ inner.T + inner_bias)
    by_hand = 15 * torch.tanh(middle @ outer.T + outer_bias)[..., 0] + 2
    assert torch.allclose(network(embeddings, hidden), by_hand, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_gate_looks_at_both_inputs_and_at_its_own_patch_only(normalize):
    network, embeddings, hidden = gate_network(normalize=normalize), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    before = network(embeddings, hidden)
    for position in (0, 1):
        inputs = [embeddings.clone(), hidden.clone()]
        inputs[position][1, 4] = torch.randn(8)
        assert (network(*inputs) != before).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("normalize", [False, True])
def test_gates_together_say_what_each_says_alone(normalize):
    embeddings, hidden = 60 * torch.randn(2, 9, 8), torch.randn(3, 2, 9, 8).unbind(0)
    gates = [gate_network(normalize=normalize) for _ in range(3)]
    assert torch.equal(gates[0].prepare(embeddings), embeddings) != normalize
    together = log_alphas(gates, embeddings, hidden)
    for gate, states, found in zip(gates, hidden, together, strict=True):
        assert torch.allclose(found, gate(embeddings, states), atol=1e-5) and found.std() > 0.1


# ---------------------------------------------------------------- ranks


def test_every_patch_taken_brings_the_taken_ones_nearest_to_the_whole():
    """Against maximum mean discrepancy written out: of all patches that are left, none would come nearer."""
    states = torch.randn(3, 12, 8)
    ranks = herding_ranks(5 * states + 1)  # scale and offset do not count
    normal = torch.nn.functional.layer_norm(states, (8,)).double()
    for picture, order in zip(normal, ranks.argsort(1, descending=True).tolist(), strict=True):
        distances = torch.cdist(picture, picture).square()
        kernel = torch.exp(-distances / distances.mean())

        def discrepancy(chosen, kernel=kernel):
            return kernel.mean() - 2 * kernel[chosen].mean() + kernel[chosen][:, chosen].mean()

        for n in range(12):
            possible = [discrepancy([*order[:n], other]) for other in order[n:]]
            assert possible[0] == pytest.approx(min(possible).item(), abs=1e-6)
        assert discrepancy(order).abs() < 1e-12 < discrepancy(order[:6])


def test_ranks_number_the_patches_of_each_picture():
    states = torch.randn(2, 9, 8)
    ranks = herding_ranks(states)
    assert torch.allclose(ranks.sort(1).values, torch.linspace(-1, 1, 9).expand(2, 9), atol=1e-6)
    moved = torch.randperm(9)
    assert torch.equal(herding_ranks(states[:, moved]), ranks[:, moved])
    assert torch.equal(herding_ranks(states[1:]), ranks[1:])


def test_one_of_every_kind_comes_before_a_second_one():
    kinds = torch.randn(3, 16)
    states = kinds[torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])] + 0.01 * torch.randn(9, 16)
    first = herding_ranks(states[None])[0].topk(3).indices
    assert sorted((first // 3).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("states", [torch.zeros(2, 9, 8), torch.ones(1, 1, 8), torch.randn(1, 2, 8)])
def test_patches_that_cannot_be_told_apart_have_ranks_too(states):
    count = states.shape[1]
    wanted = torch.linspace(-1, 1, count) if count > 1 else torch.ones(1)
    assert torch.allclose(herding_ranks(states).sort(1).values, wanted.expand(len(states), count), atol=1e-6)


def test_a_gate_starts_with_its_hints_and_looks_at_no_other():
    """Before training a gate says what its hints say; those before the ranked state are given ranks, and do not look."""
    states, hints = torch.randn(2, 9, 8), torch.randn(2, 9, 2)
    both, first = (GateNetwork(8, 15.0, 2.0, True, True, hints=starts) for starts in ((-0.5, 1.0), (-0.5,)))
    wanted = {both: hints @ torch.tensor([-0.5, 1.0]), first: -0.5 * hints[..., 0]}
    for gate, told in wanted.items():
        log_alpha = gate(states, states, hints)
        assert torch.allclose(log_alpha, 15 * torch.tanh(told) + 2, atol=1e-5)
        assert torch.allclose(log_alphas([gate], states, [states], hints)[0], log_alpha, atol=1e-5)


def test_zero_start_begins_at_add_and_can_leave_it():
    network, inputs = gate_network(zero_start=True), (torch.randn(2, 9, 8), torch.randn(2, 9, 8))
    log_alpha = network(*inputs)
    assert (log_alpha == 2).all() and gate_network()(*inputs).std() > 0
    log_alpha[0, 0].backward()
    assert network.outer.weight.grad.abs().sum() > 0


def test_normalize_takes_out_scale_and_offset_of_each_input():
    embeddings, hidden = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    for normalize in (True, False):
        network = gate_network(normalize=normalize)
        before, scaled = network(embeddings, hidden), network(60 * embeddings + 3, 7 * hidden - 1)
        assert torch.allclose(before, scaled, atol=1e-3) == normalize
    assert [name for name, _ in network.named_parameters()] == [
        "inner.weight",
        "inner.bias",
        "outer.weight",
        "outer.bias",
    ]


def test_votes_multiply_over_layers():
    probability = torch.rand(2, 4, 9).clamp(min=0.05)
    combined = combine_votes(probability.log()).exp()
    for layer in range(4):
        assert torch.allclose(combined[:, layer], probability[:, : layer + 1].prod(1), atol=1e-6)
    assert torch.equal(combine_votes(probability.log(), aggregated=False), probability.log())


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 0.7, 3.0])
def test_mean_is_as_exact_as_it_says(log_alpha):
    gate = HardConcrete(torch.tensor(log_alpha, dtype=torch.float64), 0.2, -0.2, 1.0)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    survival = torch.sigmoid(gate.log_alpha - 0.2 * torch.logit((t + 0.2) / 1.2))
    assert abs(gate.mean - survival.mean()) < 2e-4
