"""Which expert gets how many bits: what each choice costs, and the best choice under a budget."""
