"""Light modules in the place of experts that a token ranks low."""
