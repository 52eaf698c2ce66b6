"""Models and activations."""
