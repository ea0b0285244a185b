"""The inference runtime: kernels, model, memory, engine, service."""
