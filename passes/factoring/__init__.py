"""Matrices as products of thinner ones: whitened singular value decomposition, shared bases, shared projections."""
