"""What is looked at: maps, films, overlays, and how close two films are."""
