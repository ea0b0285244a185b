"""Compiled artefacts of a generation, each verified against torch."""
