"""Reproduction and speed: every figure in RESULTS.md comes from a command here."""
