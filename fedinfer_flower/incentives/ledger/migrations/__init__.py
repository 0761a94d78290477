"""How the ledger's tables came to be, one module a revision; see `migrating`."""
