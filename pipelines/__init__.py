"""Arguments, components and progress bars of the diffusers pipelines; installed as `gpstoken_diffusers.pipelines`."""
