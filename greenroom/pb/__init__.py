"""Generated protobuf and gRPC stubs, committed; `make protos` regenerates them."""
