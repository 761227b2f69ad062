"""Optimizers: what Muon does, who trains which parameter, several optimizers as one, learning rates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from training_runs import TINY

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.training.muon import Muon, orthogonalise, split_parameters
from gpstoken_diffusers.training.optimization import OptimizerGroup, build_optimizer, learning_rate_scale


def newton_schulz(matrix):
    """The iteration as it is written down, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("smallest", [1, 0.01, 0.001])
@pytest.mark.parametrize("shape", [(64, 64), (64, 90), (40, 400), (400, 40), (1, 9)])
def test_orthogonalised_updates_are_those_of_the_iteration(shape, smallest):
    generator, rank = torch.Generator().manual_seed(0), min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in shape)
    matrix = left * torch.logspace(0, math.log10(smallest), rank) @ right.T
    expected, update = newton_schulz(matrix), orthogonalise(matrix).double()
    # bfloat16 in the middle of five steps that make small singular values hundreds of times larger.
    assert (update - expected).norm() < 0.2 * expected.norm()
    # The coefficients trade accuracy for speed: singular values end between about 0.7 and 1.2, but for tiny ones.
    assert torch.linalg.svdvals(update).max() < 1.3


def test_muon_learns_and_takes_only_matrices():
    torch.manual_seed(0)
    target, layer = torch.randn(8, 8), torch.nn.Linear(8, 8, bias=False)
    optimizer = Muon([layer.weight], lr=0.05)
    inputs = torch.randn(64, 8)
    losses = []
    for _ in range(300):
        loss = (layer(inputs) - inputs @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_every_parameter_has_one_optimizer():
    model = AutoencoderGPSToken(**TINY, sample_size=32, map_size=8, stem_patch_size=4, decoder_type="lattice")
    matrices, others = split_parameters(model)
    ids = [id(parameter) for parameter in (*matrices, *others)]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert all(parameter.ndim >= 2 for parameter in matrices)
    assert any(parameter is model.refiner.texture_head.weight for parameter in others)


def made_up_problem(seed: int = 0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    return network, torch.randn(16, 6)


def descend(network, optimizers, inputs, steps: int = 3):
    for _ in range(steps):
        loss = (network(inputs) - inputs).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_group_is_what_its_optimizers_are_beside_each_other():
    grouped, inputs = made_up_problem()
    apart, _ = made_up_problem()
    make = lambda network: [  # noqa: E731
        Muon([network[0].weight, network[2].weight], lr=0.01),
        torch.optim.AdamW([network[0].bias, network[2].bias], lr=0.1),
    ]
    descend(grouped, [OptimizerGroup(make(grouped))], inputs)
    descend(apart, make(apart), inputs)
    for one, other in zip(grouped.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_group_goes_on_from_its_state():
    whole, inputs = made_up_problem()
    build = lambda network: build_optimizer(network, "muon", 0.01, 0.1, 0.01)  # noqa: E731
    optimizer = build(whole)
    descend(whole, [optimizer], inputs, steps=2)
    resumed, _ = made_up_problem(seed=1)
    resumed.load_state_dict(whole.state_dict())
    restored = build(resumed)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would give it
    descend(whole, [optimizer], inputs)
    descend(resumed, [restored], inputs)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rates_reach_every_optimizer_of_a_group():
    network, inputs = made_up_problem()
    optimizer = build_optimizer(network, "muon", 0.01, 0.1, 0.0)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    descend(network, [optimizer], inputs, steps=1)
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))


def test_float16_scaling_looks_at_all_gradients_of_a_group():
    """One infinite gradient keeps every optimizer of the group from stepping."""
    network, inputs = made_up_problem()
    optimizer = build_optimizer(network, "muon", 0.01, 0.1, 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    scaler.scale((network(inputs) - inputs).square().mean()).backward()
    network[0].bias.grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert scaler.get_scale() == 2.0  # halved once


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_frozen_parameters_are_left_out(optimizer):
    network, inputs = made_up_problem()
    network[0].requires_grad_(False)
    frozen = network[0].weight.clone()
    descend(network, [build_optimizer(network, optimizer, 0.01, 0.01, 0.5)], inputs)
    assert torch.equal(network[0].weight, frozen)


def test_learning_rates():
    cosine = [learning_rate_scale(step, 2, 10, 0.1) for step in range(12)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.55)  # half of the way from 2 to 10
    assert cosine[10] == cosine[11] == pytest.approx(0.1)
    assert [learning_rate_scale(step, 2, 10, 0.1, "constant") for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "step, share, scale",
    [(0, 0.0, 0.25), (3, 0.5, 1.0), (4, 0.0, 1.0), (4, 0.5, 0.55), (900, 0.5, 0.55), (4, 1.0, 0.1), (4, 1.3, 0.1)],
)
def test_a_rate_over_minutes_does_not_look_at_steps(step, share, scale):
    assert learning_rate_scale(step, 4, 100, 0.1, "minutes", share) == pytest.approx(scale)
