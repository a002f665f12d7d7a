"""The other forms: whole state dictionaries, accelerate's ranks' files, safetensors, our canonical folder."""
