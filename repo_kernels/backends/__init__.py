"""The backends that compute the losses, and the interface they share."""
