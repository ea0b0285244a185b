"""Stubs of the package `inference`, the Open Inference Protocol v2."""
