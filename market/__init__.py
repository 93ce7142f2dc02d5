"""Order book, matching, reputation and the ledger. Pure, but for the settlement adapters."""
