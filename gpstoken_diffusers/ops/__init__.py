"""A native function beside its reference: splatting, partition, norms of maps, RoIAlign."""
