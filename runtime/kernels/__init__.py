"""Tensor arithmetic of routed mixtures: tensors in, tensors out."""
