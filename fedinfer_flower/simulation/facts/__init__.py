"""A structured world of facts, and small language models that know parts of it."""
