"""Memory: the bytes that a run holds at its peak, and the micro-batch that fits into what is free."""
