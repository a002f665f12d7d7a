"""The model: built, initialised in shards, made trainable, exported."""
