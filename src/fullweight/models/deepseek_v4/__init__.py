"""DeepSeek-V4: sizes (config.py), arithmetic (flops.py), mathematics (model.py and the blocks beside it)."""
