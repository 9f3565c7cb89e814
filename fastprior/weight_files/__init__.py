"""Bytes to tensors: files of weights of any kind and folders of diffusers."""
