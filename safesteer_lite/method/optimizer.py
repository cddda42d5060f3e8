"""AdamW on float32 copies of adapter weights that are kept in a shorter type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW on float32 copies of the adapter weights, which themselves stay in the compute dtype.

    bf16 keeps 8 bits of mantissa, so steps of 1e-4 on weights of 0.03 would be rounded away; on a CPU, adapters in
    float32 would cost more time than the frozen bf16 blocks they adapt.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], averaging: float = 0.0) -> None:
        """Take over the weights.

        Args:
            parameters: the adapter's.
            averaging: share of the running average that each step keeps, from 0 (the average is the last step) to below 1.
        """
        self.parameters = list(parameters)
        self.averaging, self.steps = averaging, 0
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        self.averages = [master.detach().clone() for master in self.masters] if averaging else []
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)

    @property
    def bytes_to_come(self) -> int:
        """What the next step takes of memory beside what is there between two steps: the sums of the gradients, what an update of
        all weights together holds beside them, and before the first step AdamW's two moments, which exist from then on."""
        numbers = sum(master.numel() for master in self.masters)
        return 4 * numbers * (2 if self.optimizer.state else 4)

    def zero(self) -> None:
        """Forget the gradients."""
        for master in self.masters:
            master.grad = None

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add a micro-batch's gradients to those of the others, in float32: a sum in bf16 would lose the small ones.

        Args:
            gradients: of each of `parameters`; None is zero.
        """
        for master, gradient in zip(self.masters, gradients, strict=True):
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def step(self, learning_rate: float, gradient_clip: float) -> float:
        """One update by the gradients that were added; returns their norm before clipping."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.steps += 1
        # The first average is the first step's weights: averaging the untrained adapter in would only hold it back.
        share = max(1 - self.averaging, 1 / self.steps)
        with torch.no_grad():
            for average, master in zip(self.averages, self.masters, strict=False):
                average.lerp_(master, share)
        self.publish(self.masters)
        return float(norm)

    def publish(self, weights: Sequence[Tensor]) -> None:
        """Write float32 weights into the adapter."""
        with torch.no_grad():
            for weight, parameter in zip(weights, self.parameters, strict=True):
                parameter.copy_(weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapter holds the averaged weights, if there are any."""
        self.publish(self.averages or self.masters)
        try:
            yield
        finally:
            self.publish(self.masters)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors for a safetensors file."""
        tensors = {"steps": torch.tensor(self.steps)}
        tensors |= {f"{index}.average": average.clone() for index, average in enumerate(self.averages)}
        for index, master in enumerate(self.masters):
            tensors[f"{index}.master"] = master.detach().clone()
            for name, value in self.optimizer.state[master].items():
                tensors[f"{index}.{name}"] = torch.as_tensor(value).detach().clone()
        return tensors

    def is_finite(self) -> bool:
        """Whether every trained weight is a finite number."""
        return all(bool(master.isfinite().all()) for master in self.masters)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a `state` and write the weights into the adapter.

        Raises:
            KeyError: something is missing from it.
        """
        self.steps = int(tensors["steps"])
        with torch.no_grad():
            for index, average in enumerate(self.averages):
                average.copy_(tensors[f"{index}.average"])
            for index, master in enumerate(self.masters):
                master.copy_(tensors[f"{index}.master"])
                if self.steps:
                    self.optimizer.state[master] = {
                        # torch keeps the number of steps on the CPU.
                        "step": tensors[f"{index}.step"].clone(),
                        **{name: tensors[f"{index}.{name}"].to(master.device).clone() for name in _MOMENTS},
                    }
        self.publish(self.masters)
