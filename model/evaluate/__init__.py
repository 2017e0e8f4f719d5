"""What the frozen backbone is worth, beside the same network untrained and trivial baselines."""
