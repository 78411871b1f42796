"""Data: sources.py has the bytes, plan.py the order and crops, decode.py the pixels, loader.py the batches."""
