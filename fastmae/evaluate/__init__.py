"""Evaluation of a frozen model: features, k-NN, linear probe, reconstruction pictures. Knows no trainer."""
