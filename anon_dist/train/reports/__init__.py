"""What a run leaves to be read: metrics, reports, plots, traces."""
