"""The expert server: one shard of experts behind gRPC."""
