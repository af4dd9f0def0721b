"""Fast layers: working copies of weights and compiled decoder layers, and the trial that lets a policy use them."""
