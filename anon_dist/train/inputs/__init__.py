"""What a run reads: prepared folders, the order of their samples, the vocabulary, random states."""
