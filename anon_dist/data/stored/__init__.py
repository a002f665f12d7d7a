"""A prepared folder, here or at an address: its index, shards, checksums, and copies of what is far away."""
