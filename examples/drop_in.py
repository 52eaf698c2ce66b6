"""Drop-in: train any model with any torch optimizer, by feedback instead of gradients."""

import torch

import lfp_kernels
from lfp_kernels.app import data, models

digits = data.load("digits")
model = models.build("lenet")
composite = lfp_kernels.composites.Epsilon(eps=1e-6)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(5):
    for x, y in zip(digits.train_x.split(128), digits.train_y.split(128)):
        optimizer.zero_grad()
        with composite.context(model):
            out = model(x)
            lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, y))  # .grad = -feedback
        optimizer.step()
    correct = (model(digits.test_x).argmax(1) == digits.test_y).float().mean()
    print(f"epoch {epoch + 1}: test accuracy {correct:.1%}")
