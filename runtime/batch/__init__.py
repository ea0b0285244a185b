"""Offline: rows in, answers out, through the same engine; exact when interrupted."""
