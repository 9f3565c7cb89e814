"""DALLE2-pytorch's network."""
