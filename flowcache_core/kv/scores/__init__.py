"""Scores by which a KV policy ranks rows: one file each."""
