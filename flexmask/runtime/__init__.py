"""What happens at a call: checks, caches, maps of tiles, and the backends that run them."""
