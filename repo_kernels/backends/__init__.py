"""The backends that compute the losses, their interface, and the choice between them.

Nothing here imports `losses` or `layers`; those import the backends.
"""
