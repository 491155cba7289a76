"""Frozen feature networks, for perceptual losses and for metrics."""
