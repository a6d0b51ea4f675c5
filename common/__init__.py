"""What every agent and every run needs: windows, rollouts, optimizers, logs, checkpoints, evaluation."""
