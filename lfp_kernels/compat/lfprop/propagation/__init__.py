"""Composites and rules (:mod:`.propagator_lxt`)."""
