"""The `fedinfer` command: what Flower's own commands have no verb for."""
