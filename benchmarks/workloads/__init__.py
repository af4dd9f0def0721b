"""What is measured: models of several sizes, the parts of a training step, and the packages ours is compared with."""
