"""Where the velocity jumps: the order of sample.py's solvers, their evaluations, their times."""
import math

import numpy as np
import pytest
import torch

from sample import Sampling, evaluations, ode_sample, time_grid


@pytest.mark.parametrize("method", ["heun", "ab2"])
def test_a_jump_costs_an_order_unless_it_is_a_break(method):
    """As where guidance sets in at 0.1. The ODE dz/dt = z, then 3 t² z, has a closed form."""
    def velocity(z, t):
        return (3 * t**2 if t > 0.1 else 1) * z

    def order(breaks):
        """The power of the number of steps by which the error falls: the slope of its logarithm."""
        exact, counts, z = math.exp(0.1 + 1 - 0.1**3), (160, 320, 640, 1280), 1.0
        errors = [abs(ode_sample(velocity, z, n, method, breaks) - exact) for n in counts]
        return -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order(()) < 1.3
    assert order((0.1,)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("steps", [7, 50])
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
