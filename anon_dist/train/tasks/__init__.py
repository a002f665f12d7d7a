"""lm-eval's tasks on a model, after a training and during one."""
