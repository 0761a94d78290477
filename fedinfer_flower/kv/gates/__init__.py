"""Gates, one a module: each is registered by existing."""
