"""The optimizer a run steps, its γ by step, and what is watched of its state."""
