"""Weights of a module in packed formats: which matrices there are, and what becomes of each."""
