"""Whether a run is well: hangs, slow hosts, spikes, signals."""
