"""Results as Markdown tables and figures."""
