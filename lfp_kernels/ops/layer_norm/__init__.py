"""Layer, RMS and group normalisation: reference only."""

from __future__ import annotations

from ...backends import register
from . import reference

register("layer_norm", reference=reference)
