"""Image embeddings over HTTP: texts or their embeddings in, steps shared by everybody's requests."""
