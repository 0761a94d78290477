"""The gateway: a ServerApp that answers over HTTP."""
