"""Files of `torch.save` and of safetensors: read without running code, laid out before the tensors exist."""
