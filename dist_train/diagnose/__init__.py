"""Measured diagnoses: curves, bias and variance, the loss landscape, representations, the learning rate."""
