"""Hand-encoded protobuf for the data plane: valid bytes of the .proto, without its copies."""
