"""What upcycle is made of: copies of a block, whole, in shards or perturbed, and what several models give."""
