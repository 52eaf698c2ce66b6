"""Train neural networks without gradients: fused kernels for Layer-wise Feedback Propagation."""

__version__ = "0.1.0"
