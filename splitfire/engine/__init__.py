"""Model and cache: token ids in, token ids out. Knows nothing of gRPC, UCX, text, or where a request came from."""
