"""Weights for routers that no training has seen."""
