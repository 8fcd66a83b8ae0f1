"""What nm-sparsify is made of: masks, the global threshold and the second-order solve."""
