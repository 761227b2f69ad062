"""ComfyUI nodes over GPSToken; installed as `gpstoken_diffusers.comfyui_nodes`."""
