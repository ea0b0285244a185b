"""Many machines: offline runs on Ray Data, serving on Ray Serve."""
