"""The `splitfire` command. Starts services as processes and talks to them over gRPC; imports none of them."""
