"""Is everything there that a training on these nodes needs: each node looked at, and what joins them, before a run is started."""
