"""Stubs of the package `greenroom.v1`."""
