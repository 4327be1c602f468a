"""The solvers of sample.py: their order, their evaluations, their times."""
import math

import numpy as np
import pytest
import torch

from sample import Sampling, evaluations, ode_sample, time_grid

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
    """As where guidance sets in at EDGE: another Gaussian's velocity from there on."""
    return (RIGHT if t > EDGE else LEFT)[0](z, t)


def order(velocity, exact, method, breaks=()):
    """The power of the number of steps by which the error falls: the slope of its logarithm."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    counts = 160, 320, 640, 1280
    errors = [(ode_sample(velocity, z, n, method, breaks) - exact(z)).abs().max() for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("method, expected", [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_the_error_falls_with_the_order_of_the_method(method, expected):
    velocity, flow = LEFT
    assert order(velocity, lambda z: flow(z, 0, 1), method) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("method", ["heun", "ab2"])
def test_a_jump_costs_an_order_unless_it_is_a_break(method):
    def exact(z):
        return RIGHT[1](LEFT[1](z, 0, EDGE), EDGE, 1)
    assert order(jumping, exact, method) < 1.3
    assert order(jumping, exact, method, (EDGE,)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("steps", [7, 25, 50])
def test_evaluations_and_times(steps):
    """Each piece between breaks shares the steps by its length, and ab2 begins each with one
    evaluation more. It is evaluated only inside itself, where one rule holds."""
    for method, expected in {"euler": steps, "heun": 2 * steps - 1, "ab2": steps + 1}.items():
        assert evaluations(Sampling(steps=steps, method=method)) == expected
    assert evaluations(Sampling(2.0, steps=steps, method="ab2")) == steps + 2  # guided from 0.1 on
    assert time_grid(steps) == [[i / steps for i in range(steps + 1)]]
    assert [len(piece) - 1 for piece in time_grid(20, (0.8, 0.1))] == [2, 14, 4]
    assert time_grid(1, (0.1,)) == [[0, 0.1], [0.1, 1]]  # one step each, at least
    times = []
    ode_sample(lambda z, t: times.append(t) or 0 * z, torch.zeros(1), steps, "ab2", (0.1, 0.8))
    assert times[0] == 0 and not {0.1, 0.8, 1.0} & set(times)
    assert min(t for t in times if t > 0.1) == pytest.approx(0.1)
