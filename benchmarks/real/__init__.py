"""Measurements on real images with a real Vision Transformer; `make real` fetches both."""
