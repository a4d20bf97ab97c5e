"""BERT's Adam as CLIP4Clip trains with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class BertAdam(torch.optim.Optimizer):
    r"""Adam without bias correction, with decoupled weight decay and each parameter's gradient clipped on its own.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              p \leftarrow p - \eta \, (m / (\sqrt{v} + \epsilon) + \lambda p)

    Without the correction the first step has 0.71 times the length of Adam's, and those around the fifteenth 1.5 times.
    Source: CLIP4Clip's recipe, which takes it from BERT's code.

    Args:
        parameters: or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments. Default: 0.9, 0.98.
        eps: added outside the square root. Default: 1e-6.
        weight_decay: Default: 0.2.
        max_grad_norm: norm to which each parameter's gradient is clipped, on top of the global norm that a training
            loop clips to. Default: 1.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        max_grad_norm: float = 1.0,
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                norm = torch.linalg.vector_norm(parameter.grad)
                gradient = parameter.grad * (group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
                mean = state["exp_avg"].lerp_(gradient, 1 - first)
                square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                change = mean / square.sqrt().add_(group["eps"])
                parameter.add_(change.add_(parameter, alpha=group["weight_decay"]), alpha=-group["lr"])
        return loss
