"""The bundled model, and the demonstration that runs on it."""
