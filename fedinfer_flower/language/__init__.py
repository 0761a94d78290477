"""A local language model: folder in, prompts and caches through it, text out."""
