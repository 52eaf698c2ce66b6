"""Fused: the model is traced once, then trained without autograd."""

import lfp_kernels
from lfp_kernels.app import data, models

digits = data.load("digits")
model = models.build("lenet")
composite = lfp_kernels.composites.Epsilon(eps=1e-6)
optimizer = lfp_kernels.optim.SGD(lr=0.05, momentum=0.9, clip_norm=3.0)
step = lfp_kernels.fuse(model, composite, reward="softmax", optimizer=optimizer)
for epoch in range(5):
    for x, y in zip(digits.train_x.split(128), digits.train_y.split(128)):
        result = step(x, y)  # result.out, result.reward; the weights are updated
    correct = (model(digits.test_x).argmax(1) == digits.test_y).float().mean()
    print(f"epoch {epoch + 1}: test accuracy {correct:.1%}")
