"""One run: where policies, the KV cache and a network meet."""
