"""Training: advantages, multipliers, the loss and the optimiser turn scores into an update of the policy."""
