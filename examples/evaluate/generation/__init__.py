"""What evaluate_generation.py judges, and its classifier."""
