"""Models that help each other to answer: through their caches, or by text."""
