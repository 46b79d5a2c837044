"""The training loop and what surrounds it: configuration, step, guards, ledger, run folder, evaluation."""
