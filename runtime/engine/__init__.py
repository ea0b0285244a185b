"""Sequences, KV cache, scheduler, step and sampling."""
