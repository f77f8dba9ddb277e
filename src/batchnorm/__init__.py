"""Batch normalization for PyTorch (Ioffe & Szegedy 2015): train in fewer steps, and measure by how much."""
