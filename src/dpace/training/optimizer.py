"""The optimizers: AdamW, or Muon for the drafter's matrices with AdamW for its norms.

Muon needs far fewer steps than AdamW where the budget is small.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpace.config import TrainConfig
from dpace.fast.packing import has_fast_bf16
from dpace.modeling_dflash import TOKEN_TABLES
from dpace.system import ranks
from dpace.training.sharding import take_share

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that brings singular values near 1 in five steps (Keller Jordan's)."""
MIN_ASPECT = 2
"""Least width of a matrix, in heights, from which on its gram matrix is faster to take steps on."""
TABLE_DECAY = 1.0
"""Weight decay of tables of tokens beside Muon, times the learning rate in each step.

Short trainings see most pairs of tokens once or twice, and learned them by heart without it. Chosen on validation
answers and on prompts that nothing was trained on; benchmarks/tried.md has what it gains.
"""


def products_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the factors in matrix products: bf16, and on a CPU what `--train.products` says."""
    if device.type != "cpu" or config.products == "bfloat16":
        return torch.bfloat16
    is_rounded = config.products == "auto" and has_fast_bf16()
    return torch.bfloat16 if is_rounded else torch.float32


def is_factor(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter of a drafter is a factor of products: a matrix, but no bias and no table of tokens."""
    return parameter.ndim == 2 and "bias" not in name and not name.endswith(TOKEN_TABLES)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a training; weight decay leaves out norms, and beside Muon tables have their own."""
    is_muon = config.optimizer == "muon"
    matrices = []
    norms = []
    tables = []
    for name, parameter in model.named_parameters():
        is_matrix = is_factor(name, parameter) if is_muon else parameter.ndim > 1
        if is_muon and name.endswith(TOKEN_TABLES):
            tables.append(parameter)
        elif is_matrix:
            matrices.append(parameter)
        else:
            norms.append(parameter)
    options: Any = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if not is_muon:
        return torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0.0}], **options)
    # Checkpoints number the parameters in the order of the groups.
    groups = [{"params": norms, "momentum": None, "weight_decay": 0.0}, {"params": matrices, "momentum": 0.95}]
    if tables:
        groups.append({"params": tables, "momentum": None, "weight_decay": TABLE_DECAY})
    return MuonAdamW(groups, products_dtype(config, matrices[0].device), **options)


def orthogonalize(matrix: Float[Tensor, "rows columns"], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """Bring all singular values of a matrix near 1 (0.7 to 1.2) by a Newton-Schulz iteration.

    It computes in `dtype`. `torch.optim.Muon` always takes bf16, in which products are slow on a CPU without units for
    it. In fp32 the steps of a matrix that is much wider than tall are taken on its small gram matrix, which takes
    fewer operations; their factors are multiplied first, and with the matrix once. In bf16 that would round too much.

    Source: Muon (https://kellerjordan.github.io/posts/muon), after Bernstein and Newhouse (arXiv 2409.20325).
    """
    x = matrix.to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T  # the gram matrix of the short side is the small one
    x = x / x.norm().clamp_min(1e-7)  # all singular values are at most 1 then, where the iteration converges
    first, third, fifth = COEFFICIENTS
    # A step is x <- (first + third G + fifth G^2) x, with the gram matrix G = x x^T.
    if dtype == torch.float32 and x.shape[1] >= MIN_ASPECT * x.shape[0]:
        gram = x @ x.T
        factors: list[Tensor] = []
        for _ in range(5):
            if factors:
                # The gram matrix of F x is F G F, since a factor F is symmetric.
                gram = factors[-1] @ gram @ factors[-1]
            factor = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
            factor.diagonal().add_(first)
            factors.append(factor)
        x = torch.linalg.multi_dot([*reversed(factors), x])
    else:
        for _ in range(5):
            gram = x @ x.T
            factor = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
            x = torch.addmm(x, factor, x, beta=first)
    if is_tall:
        x = x.T
    return x.to(matrix.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW that moves the matrices of groups with a `momentum` along their orthogonalized momentum instead.

    `buffer = momentum * buffer + (1 - momentum) * grad`; the step is `orthogonalize` of the Nesterov mix of the two,
    times `0.2 * sqrt(max(rows, columns))`, so that it is as long as AdamW's and takes the same learning rate.

    Memory: one buffer a matrix, two a vector. Of sharded matrices, one at a time is whole on each rank: the iteration
    needs all of it, and each rank computes it, as without shards.

    Args:
        groups: of parameters, each with a `momentum`, or None for AdamW.
        dtype: of the products of `orthogonalize`.
        options: of `torch.optim.AdamW`.

    Source: Muon as above; the scale from Liu et al. (arXiv 2502.16982), section 2.2.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options: Any):
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; the gradients of matrices are gone then, so that AdamW leaves them alone."""
        for group in self.param_groups:
            if group["momentum"] is None:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_matrix(parameter, group)
                    parameter.grad = None
        return super().step(closure)

    def _step_matrix(self, parameter: nn.Parameter, group: dict) -> None:
        """Take the step of one matrix."""
        grad = parameter.grad
        state = self.state[parameter]
        momentum = group["momentum"]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        nesterov = grad.lerp(buffer, momentum)
        update = take_share(orthogonalize(ranks.whole(nesterov), self.dtype), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])  # decoupled, as AdamW's
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
