"""Finds, loads and diagnoses the native libraries."""
