"""Target propagation (DTP, L-DRL, DDTP-linear) on the library's products.

Forward: ``h_i = f(h_{i-1} W_i^T)``. Feedback: ``g_i(u) = k(u Q_i^T)``, Q_i [I, O]. Targets come
down by the difference rule, and every layer learns from its own target:

    t_L = h_L + beta * (-dL/dh_L),   t_{i-1} = h_{i-1} + g_i(t_i) - g_i(h_i)
    weight step of layer i:  [f'(z_i) * (t_i - h_i)]^T h_{i-1}

What differs is how Q is trained. DTP (Lee 2015) reconstructs a noisy input; L-DRL (Ernoult 2022)
makes Q_i the transpose of W_i by local differences; DDTP-linear (Meulemans 2020) teaches every
layer straight from the output: direct feedback alignment with a trained D.

    python -m examples.target_propagation
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lfp_kernels.functional as F
from lfp_kernels.rules import Gradient

GRADIENT = Gradient()


def weight_product(s: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """``s^T x``, shaped like ``like``: the weight product of every rule here."""
    found = F.linear_redistribute(x, like, None, s, s, GRADIENT, need=(False, True, False))
    assert found.weight is not None
    return found.weight


class TargetPropagation:
    """A tanh (or linear) MLP with a linear last layer, and its feedback weights.

    Args:
        sizes: widths, input first. linear: no tanh anywhere. seed: of W and Q.
    """

    def __init__(self, sizes: list[int], *, linear: bool = False, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.linear = linear
        self.weights, self.feedback, self.direct = [], [], []
        for inputs, outputs in zip(sizes, sizes[1:]):
            bound = (6 / (inputs + outputs)) ** 0.5
            self.weights.append((torch.rand(outputs, inputs, generator=g) * 2 - 1) * bound)
            self.feedback.append((torch.rand(inputs, outputs, generator=g) * 2 - 1) * bound)
            self.direct.append((torch.rand(outputs, sizes[-1], generator=g) * 2 - 1) * bound)

    def layer(self, i: int, h: Tensor) -> Tensor:
        z = F.linear(h, self.weights[i])
        return z if self.linear or i == len(self.weights) - 1 else z.tanh()

    def back(self, i: int, u: Tensor) -> Tensor:
        """g_i"""
        z = F.linear(u, self.feedback[i])
        return z if self.linear or i == 0 else z.tanh()

    def forward(self, x: Tensor) -> list[Tensor]:
        h = [x]
        for i in range(len(self.weights)):
            h.append(self.layer(i, h[-1]))
        return h

    # -- training of the feedback weights

    def dtp_feedback(self, h: list[Tensor], lr: float, sigma: float) -> None:
        """One step of every Q_i on ``mse(g(f(h~)), h~)``, ``h~ = h + sigma * noise``."""
        for i in range(1, len(self.weights)):
            noisy = h[i] + sigma * torch.randn_like(h[i])
            u = self.layer(i, noisy)
            found = self.back(i, u)
            error = noisy - found
            if not self.linear:
                error = error * (1 - found * found)
            self.feedback[i] += lr / len(u) * weight_product(error, u, self.feedback[i])

    def ldrl_feedback(self, h: list[Tensor], lr: float, sigma: float) -> None:
        """One step of every Q_i on L-DRL's loss of differences,
        ``-2 <dx, g(f(x+dx)) - g(f(x))> + |g(y+dy) - g(y)|^2``; for linear layers its minimum is
        ``Q = W^T``."""
        for i in range(1, len(self.weights)):
            x, y, q = h[i], h[i + 1], self.feedback[i]
            dx, dy = sigma * torch.randn_like(x), sigma * torch.randn_like(y)
            moved = self.layer(i, x + dx)
            there, back = self.back(i, moved), self.back(i, y)
            there2 = self.back(i, y + dy)

            def slope(value: Tensor) -> Tensor:
                return torch.ones_like(value) if self.linear else 1 - value * value

            change = there2 - back
            # Minus half the gradient: each product is (signal at g's output)^T (its input).
            step = weight_product(dx * slope(there), moved, q)
            step -= weight_product(dx * slope(back), y, q)
            step -= weight_product(change * slope(there2), y + dy, q)
            step += weight_product(change * slope(back), y, q)
            q += lr / (len(x) * sigma**2) * step

    def ddtp_feedback(self, x: Tensor, lr: float, sigma: float, decay: float = 0.0) -> None:
        """One step of every direct D_i on the difference reconstruction loss: a noise in layer i,
        seen at the output, should come back as itself."""
        h = self.forward(x)
        for i in range(1, len(self.weights)):
            noise = sigma * torch.randn_like(h[i])
            u = h[i] + noise
            for k in range(i, len(self.weights)):
                u = self.layer(k, u)
            seen = u - h[-1]
            d = self.direct[i - 1]
            error = noise - F.linear(seen, d)
            step = weight_product(error, seen, d)
            d += lr / (len(x) * sigma**2) * step - decay * d

    # -- training of the forward weights

    def targets(self, h: list[Tensor], step: Tensor) -> list[Tensor]:
        """t_1 .. t_L; ``step`` = what the output should move by."""
        t = [h[-1] + step]
        for i in range(len(self.weights) - 1, 0, -1):
            t.insert(0, h[i] + self.back(i, t[0]) - self.back(i, h[i + 1]))
        return t

    def direct_targets(self, h: list[Tensor], step: Tensor) -> list[Tensor]:
        """DDTP-linear: every layer hears the output's step through its own D_i."""
        hidden = [value + F.linear(step, d) for value, d in zip(h[1:-1], self.direct)]
        return [*hidden, h[-1] + step]

    def learn(self, h: list[Tensor], t: list[Tensor], lr: float) -> None:
        """One local step of every layer towards its target."""
        for i, (value, target) in enumerate(zip(h[1:], t)):
            delta = target - value
            if not self.linear and i < len(self.weights) - 1:
                delta = delta * (1 - value * value)
            self.weights[i] += lr / len(value) * weight_product(delta, h[i], self.weights[i])


def train(method: str, epochs: int = 30, seed: int = 0) -> float:
    """Test accuracy on the 8x8 digits of a 64-32-32-10 network."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    x, y = x[order] - x.mean(0), y[order]
    net = TargetPropagation([64, 32, 32, 10], seed=seed)
    for _ in range(epochs):
        for rows in torch.randperm(1437).split(64):
            h = net.forward(x[rows])
            step = nn.functional.one_hot(y[rows], 10) - h[-1].softmax(1)
            if method == "dtp":
                net.dtp_feedback(h, 0.1, 0.1)
            elif method == "l-drl":
                for _ in range(3):
                    net.ldrl_feedback(h, 0.02, 0.1)
            else:
                net.ddtp_feedback(x[rows], 0.02, 0.1)
            t = net.direct_targets(h, step) if method == "ddtp" else net.targets(h, step)
            net.learn(h, t, 0.3)
    return float((net.forward(x[1437:])[-1].argmax(1) == y[1437:]).float().mean())


if __name__ == "__main__":
    for name in ("dtp", "l-drl", "ddtp"):
        print(f"{name:<6} test accuracy {train(name):.1%}")
