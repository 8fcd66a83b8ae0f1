"""What factorize is made of: which neurons go together, and experts made of some of a block's neurons."""
