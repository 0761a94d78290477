"""KV caches: layout, compression, token alignment, fusers, gates, and the choice of medium."""
