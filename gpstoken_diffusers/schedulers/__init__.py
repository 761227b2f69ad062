"""Samplers: how noise becomes data along a learned velocity field."""
