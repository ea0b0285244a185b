"""Makes experts, routers and locator entries; writes generations."""
