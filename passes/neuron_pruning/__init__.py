"""What prune-micro-experts is made of: scores of neurons and the choice of those that stay."""
