"""What group-route and reuse-experts are made of."""
