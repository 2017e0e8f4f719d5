"""dinoctl's data plane: networks, losses, data and the training loop. It knows nothing of `orchestrator`."""
