"""A batch, its documents, and the loss on it, in training and validation."""
