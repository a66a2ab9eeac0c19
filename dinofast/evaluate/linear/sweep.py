"""Many linear classifiers on features that are computed once, trained together: every learning rate
with every choice of features, as DINOv2 evaluates (arXiv 2304.07193, appendix B.3).

One step on a batch X (B, K) with labels y, for classifier r on the columns of its choice g:

    P = softmax(X_g W_gr + b_gr)        dW_gr = X_g' (P - onehot(y)) / B
    V_gr = 0.9 V_gr + dW_gr             W_gr -= lr_r(t) V_gr

The classifiers of one choice see the same X_g: R matrix products (B, D) x (D, C) are one (B, D) x
(D, R C), and so are the gradients. The update of all is one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.sampler import epoch_order
from .features import hits

MOMENTUM = 0.9
INIT_STD = 0.01
# DINOv2's; on a small set the first is more, on a large one the second
STEPS, EPOCHS = 12_500, 10
CHUNK_ELEMENTS = 2**25  # of the scores held at a time: 128 MiB


@dataclass(frozen=True)
class Classifiers:
    """G choices of features, R classifiers each, C classes. columns: those of each choice, D_g of
    them; weight (sum of D_g, R, C) and bias (G, R, C), fp32."""

    columns: tuple[slice, ...]
    weight: Tensor
    bias: Tensor

    @property
    def rows(self) -> list[slice]:
        """Of `weight`, for each choice."""
        ends = [0]
        for columns in self.columns:
            ends.append(ends[-1] + columns.stop - columns.start)
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def to(self, device: torch.device) -> Classifiers:
        return Classifiers(self.columns, self.weight.to(device), self.bias.to(device))

    def scores(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (B, K) -> (G, B, R, C)."""
        n_choices, n_rates, n_classes = self.bias.shape
        if out is None:
            out = x.new_empty(n_choices, len(x), n_rates, n_classes)
        weight, bias = self.weight.flatten(1), self.bias.flatten(1)
        for g, (columns, rows) in enumerate(zip(self.columns, self.rows, strict=True)):
            torch.addmm(bias[g], x[:, columns], weight[rows], out=out[g].flatten(1))
        return out

    def hits(self, x: Tensor, y: Tensor) -> Tensor:
        """Of images x (N, K) with labels y (N,): `linear_data.hits` (G, R, 2), on the CPU."""
        device, found = self.weight.device, torch.zeros(*self.bias.shape[:2], 2, dtype=torch.long)
        n = max(1, CHUNK_ELEMENTS // self.bias.numel())
        for features, labels in zip(x.split(n), y.split(n), strict=True):
            scores = self.scores(features.to(device)).transpose(1, 2)  # (G, R, B, C)
            found += hits(scores, labels.to(device)).cpu()
        return found


def start(columns: Sequence[slice], n_rates: int, n_classes: int, seed: int) -> Classifiers:
    """Weights N(0, 0.01), biases 0. Every classifier begins with the columns of one draw, so that
    neither the learning rates nor the other choices change where it begins."""
    width = max(part.stop for part in columns)
    generator = torch.Generator().manual_seed(seed)
    drawn = INIT_STD * torch.randn(width, n_classes, generator=generator)
    weight = torch.cat([drawn[part] for part in columns])[:, None].repeat(1, n_rates, 1)
    return Classifiers(tuple(columns), weight, torch.zeros(len(columns), n_rates, n_classes))


class Sweep:
    """SGD with momentum, without weight decay, for all classifiers at once. rates: (R,) learning
    rates at the beginning."""

    def __init__(self, classifiers: Classifiers, rates: Sequence[float]) -> None:
        self.classifiers = classifiers
        self.weight, self.bias = classifiers.weight, classifiers.bias
        self.rates = torch.tensor(rates, device=self.weight.device)[:, None]  # (R, 1)
        self._momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._gradients = torch.empty_like(self.weight), torch.empty_like(self.bias)
        self._scores = self.weight.new_empty(0)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step on x (B, K) fp32 with labels y (B,). factor: of the learning rates."""
        n_choices, n_rates, n_classes = self.bias.shape
        if self._scores.shape[1:2] != (len(x),):
            self._scores = x.new_empty(n_choices, len(x), n_rates, n_classes)
        delta = self.classifiers.scores(x, self._scores).softmax(-1)
        images = torch.arange(len(x), device=x.device)
        delta[:, images, :, y] -= 1
        delta /= len(x)
        d_weight, d_bias = self._gradients
        for g, rows in enumerate(self.classifiers.rows):
            columns = self.classifiers.columns[g]
            torch.mm(x[:, columns].t(), delta[g].flatten(1), out=d_weight[rows].flatten(1))
        torch.sum(delta, 1, out=d_bias)
        for value, momentum, gradient in zip(
            (self.weight, self.bias), self._momenta, self._gradients, strict=True
        ):
            momentum.mul_(MOMENTUM).add_(gradient)
            value.addcmul_(momentum, self.rates, value=-factor)


def cosine(step: int, steps: int) -> float:
    """Of the learning rate at its beginning, what is left at `step`: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def default_epochs(n_images: int, batch_size: int) -> int:
    """As many as make STEPS steps, EPOCHS at least."""
    return max(EPOCHS, math.ceil(STEPS / math.ceil(n_images / batch_size)))


def train(
    x: Tensor,
    y: Tensor,
    classifiers: Classifiers,
    rates: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    tell: Callable[[int, int], None],
) -> None:
    """Train all of them in place on features x (N, K) and labels y (N,), on any device: each epoch
    in another order, the learning rates on a cosine from step to step."""
    device, n = classifiers.weight.device, len(x)
    sweep, per_epoch = Sweep(classifiers, rates), math.ceil(n / batch_size)
    total = epochs * per_epoch
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(seed, epoch, n)).to(x.device)
        for i, rows in enumerate(order.split(batch_size)):
            step = epoch * per_epoch + i
            batch, labels = x[rows].to(device), y[rows].to(device)
            sweep.step(batch, labels, cosine(step, total))
            tell(step + 1, total)


def place(x: Tensor, device: torch.device) -> Tensor:
    """Features where they are trained on, if they take no more than half of the memory that is
    free there."""
    if device.type == "cuda" and x.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return x.pin_memory()
    return x.to(device)
