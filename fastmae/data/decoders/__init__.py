"""Decoders of whole batches: threads of this process, and NVIDIA DALI."""
