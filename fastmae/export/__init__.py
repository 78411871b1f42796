"""Files that other tools read, one file a format, and what leaving float32 costs there."""
