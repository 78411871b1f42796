"""Data, from files to batches.

sources.py opens what a path names (arrays.py, images.py, shards.py and parquet.py read it; in a folder, folders.py
finds the parts, which parts.py knows by their names, and suffixes.py knows what is an image). What lies there and what
of it is used is a Stock (stock.py). plan.py says which sample comes when and how it is cropped, sample.py and decode.py
turn its bytes into pixels, decoders/ do this for batches, and loader.py hands the batches over on the device.
"""
