"""From prepared folders to a run's samples: order, packing, mixtures."""
