"""Exports to files that other tools read, one module per format, and a comparison of other dtypes with float32."""
