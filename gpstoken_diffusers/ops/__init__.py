"""The operations with native versions: splatting Gaussians and partitioning images."""
