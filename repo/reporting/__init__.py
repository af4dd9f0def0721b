"""Report of a run as one HTML page, and its figures."""
