"""Time, noise, guidance and integration: from a network's velocity to samples. Knows no pictures and no models."""
