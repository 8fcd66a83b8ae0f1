"""Weights as lazy expressions over tensors in files: nothing is read before somebody loads a slice."""
