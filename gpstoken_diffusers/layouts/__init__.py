"""Where Gaussians lie. No network."""
