"""Every adversary of the market as a strategy that plugs into a real node, and what becomes of it."""
