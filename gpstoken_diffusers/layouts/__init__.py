"""Where Gaussians lie: partitions of pictures, boxes and masks, and layouts drawn or read. No network."""
