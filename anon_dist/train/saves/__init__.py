"""Whose a run's folder and its remote copy are."""
