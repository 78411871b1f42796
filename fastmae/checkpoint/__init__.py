"""Checkpoints: how they are written, verified and restored, and how a model is opened from one without training."""
