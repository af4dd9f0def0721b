"""From scores to an update: advantages, multipliers, the loss and the optimiser."""
