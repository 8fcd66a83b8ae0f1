"""What merge-models is made of: coefficients by layer, model and piece, and the fit of them on text."""
