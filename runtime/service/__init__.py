"""The gRPC service over the engine."""
