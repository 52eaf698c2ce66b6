"""Drop-in for the official LFP package lfprop 1.0.0: the same module paths, names and numbers.

from lfp_kernels.compat.lfprop.propagation import propagator_lxt   # was: from lfprop.propagation

composite = propagator_lxt.LFPEpsilonComposite()
with composite.context(model) as m:
    out = m(x.requires_grad_())
    (input_reward,) = torch.autograd.grad((out,), (x,), grad_outputs=(reward,))
for p in model.parameters():
    p.grad = -p.feedback

What is the same, what is mended and what is faster: docs/migration.md. It needs torch alone.
"""

from .propagation.feedback import backward

__all__ = ["backward"]
