"""Evaluation of a frozen model: features, k-NN, linear probe, reconstruction, search, anomalies, maps.

Nothing here depends on the trainer. An error names the argument; the command line shows its flag instead.
"""
