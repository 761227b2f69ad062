"""Diffusers pipelines over GPSToken; installed as `gpstoken_diffusers.pipelines`."""
