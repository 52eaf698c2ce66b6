"""Softmax, products of two activations, and attention by the rules of AttnLRP: reference only."""

from __future__ import annotations

from ...backends import register
from . import reference

register("attention", reference=reference)
