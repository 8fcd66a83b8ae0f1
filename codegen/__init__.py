"""Code generation: from a verified module to files that other runtimes load. It never changes weights."""
