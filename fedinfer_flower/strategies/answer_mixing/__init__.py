"""Ways to mix whole answers, one a module: each is registered by existing."""
