"""Stubs of the packages `greenroom.*`."""
