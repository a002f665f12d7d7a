"""Pretraining: configuration, model, loop, and what surrounds a run."""
