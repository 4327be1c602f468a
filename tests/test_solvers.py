"""The solvers of sample.py: their order, their evaluations, their grids of times."""
import math

import numpy as np
import pytest
import torch

import fid
from sample import METHODS, Sampling, evaluations, ode_sample, time_grid
from test_all import awake, tiny_net

EDGE = 0.1


def gaussian(mean, std):
    """(velocity, flow) of data x ~ N(mean, std²): E[v | z] in closed form, and where the ODE takes
    z from time a to time b. A Gaussian's path keeps each point at its number of deviations."""
    def spread(t):
        return math.sqrt(t * t * std * std + (1 - t) ** 2)

    def velocity(z, t):
        return mean + (t * std * std - (1 - t)) / spread(t) ** 2 * (z - t * mean)

    def flow(z, a, b):
        return b * mean + spread(b) / spread(a) * (z - a * mean)
    return velocity, flow


LEFT, RIGHT = gaussian(0.5, 1.5), gaussian(-1.0, 0.3)


def jumping(z, t):
    """Guidance that sets in at EDGE: another Gaussian's velocity from there on."""
    return (RIGHT if t > EDGE else LEFT)[0](z, t)


def order(velocity, exact, method, breaks=(), shift=1.0):
    """By which power of the number of steps the error falls: a line through logarithms."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    counts = 160, 320, 640, 1280
    errors = [(ode_sample(velocity, z, steps, method, breaks, shift) - exact(z)).abs().max()
              for steps in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("shift", [1.0, 0.7])
@pytest.mark.parametrize("method, wanted", [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_error_falls_with_the_order_of_the_method(method, wanted, shift):
    velocity, flow = LEFT
    found = order(velocity, lambda z: flow(z, 0, 1), method, shift=shift)
    assert found == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize("shift", [1.0, 0.7])
@pytest.mark.parametrize("method", ["heun", "ab2"])
def test_a_jump_costs_an_order_unless_it_is_a_break(method, shift):
    def exact(z):
        return RIGHT[1](LEFT[1](z, 0, EDGE), EDGE, 1)
    assert order(jumping, exact, method, shift=shift) < 1.3
    assert order(jumping, exact, method, (EDGE,), shift) == pytest.approx(2, abs=0.2)


def test_the_guided_side_asks_only_inside_its_interval():
    """Both edges: the end of a side is judged by its own side, whichever that is."""
    asked = []

    def velocity(z, t):
        asked.append(t)
        return 0 * z
    ode_sample(velocity, torch.zeros(1), 20, "ab2", (0.1, 0.8))
    guided = [t for t in asked if 0.1 < t < 0.8]
    assert min(guided) == pytest.approx(0.1) and 0.1 not in asked and 0.8 not in asked
    assert len(asked) == 20 + 3 and max(asked) < 1  # a step each, and the first of a side two
    ends = []
    ode_sample(lambda z, t: ends.append(t) or 0 * z, torch.zeros(1), 2, "heun", (0.5,))
    assert ends[0] == 0 and ends[1] < 0.5 < ends[2] and ends[1:] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("cfg, sides", [(1.0, 1), (2.0, 2)])
def test_evaluations(cfg, sides):
    for steps in (7, 25, 50):
        assert evaluations(Sampling(cfg, steps=steps, method="euler")) == steps
        assert evaluations(Sampling(cfg, steps=steps, method="heun")) == 2 * steps - 1
        assert evaluations(Sampling(cfg, steps=steps, method="ab2")) == steps + sides


def test_the_grid_is_even_and_its_shift_is_the_formula():
    for steps in (1, 7, 50, 333, 1000):
        assert time_grid(steps) == [[i / steps for i in range(steps + 1)]]
    assert [len(piece) - 1 for piece in time_grid(20, (0.8, 0.1))] == [2, 14, 4]
    times = time_grid(10, shift=0.5)[0]
    for i, t in enumerate(times):
        u = i / 10
        assert t == pytest.approx(u / (u + 0.5 * (1 - u)))
    assert times[5] > 0.5 and times[0] == 0 and times[-1] == 1  # denser towards the data
    left, right = time_grid(20, (0.1,), 0.7)
    assert left[0] == 0 and left[-1] == right[0] == 0.1 and right[-1] == 1
    assert len(left) + len(right) - 2 == 20 and all(a < b for a, b in zip(right, right[1:]))
    assert [len(side) for side in time_grid(1, (0.1,))] == [2, 2]  # a step a side, at least


def test_the_papers_sampler_is_bit_for_bit_the_plain_loop():
    net = awake(tiny_net())
    y, z = torch.tensor([1, 2]), torch.randn(2, 3, 8, 8)

    def velocity(z, t):
        with torch.no_grad():
            return net(z, torch.full((2,), t), y)
    wanted = z
    for i in range(10):
        t, t_next = i / 10, (i + 1) / 10
        v = velocity(wanted, t)
        if i < 9:
            v = (v + velocity(wanted + (t_next - t) * v, t_next)) / 2
        wanted = wanted + (t_next - t) * v
    assert torch.equal(ode_sample(velocity, z, 10), wanted)


def test_a_row_of_scores_names_the_solver():
    assert [Sampling(method=method).solver() for method in METHODS] == list(METHODS)
    assert Sampling(method="ab2", shift=0.8).solver() == "ab2 shift 0.8"
    assert {"method", "nfe"} <= set(fid.SETTINGS)
