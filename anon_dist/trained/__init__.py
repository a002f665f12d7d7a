"""What a training left behind: found, sampled, exported, compared.

`find.py` tells what RUN_OR_CHECKPOINT names, `export.py` makes a Hugging Face folder of it, `generate.py` has it write, `hub.py` uploads.
"""
