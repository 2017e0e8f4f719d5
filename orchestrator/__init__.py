"""dinoctl's control plane: runs on a laptop or a login node and never imports torch."""
