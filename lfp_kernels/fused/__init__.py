"""The autograd-free training step: trace once, then forward, feedback and update layer by layer."""

from .step import FusedStep, StepResult, fuse

__all__ = ["FusedStep", "StepResult", "fuse"]
