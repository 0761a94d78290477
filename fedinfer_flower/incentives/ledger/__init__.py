"""The ledger: double entry, hash-chained, append-only; escrow on top of it."""
