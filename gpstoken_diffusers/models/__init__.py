"""Networks: each one draws, encodes or predicts by itself, and knows nothing of samplers, pipelines or training."""
