"""Data, from files to batches.

sources.py opens what a path names (arrays.py, images.py, shards.py and parquet.py read it), plan.py says which sample
comes when and how it is cropped, sample.py and decode.py turn its bytes into pixels, decoders/ do this for batches, and
loader.py hands the batches over on the device.
"""
