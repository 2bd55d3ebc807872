"""Changes of the loss and of the arithmetic that `benchmarks/study.py` tries, and that dpace itself does not have.

Each is a context in which drafters are trained and measured.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import dpace.train.loop as scoring
from dpace.loss import frozen_head_nll


@contextlib.contextmanager
def distillation_temperature(temperature: float) -> Iterator[None]:
    """Train on distributions of logits divided by a temperature; losses grow by its square, as in distillation.

    The weights take the drafter's confidence from the softened distribution too. Validation is as ever.
    """

    def softened(hidden, head, *args, target_hidden=None, **kwargs):
        if target_hidden is None or not torch.is_grad_enabled():
            return frozen_head_nll(hidden, head, *args, target_hidden=target_hidden, **kwargs)
        hidden, target_hidden = hidden / temperature, target_hidden / temperature  # the demo's head is linear
        out = frozen_head_nll(hidden, head, *args, target_hidden=target_hidden, **kwargs)
        return out._replace(losses=out.losses * temperature**2)

    with mock.patch.object(scoring, "frozen_head_nll", softened):
        yield
