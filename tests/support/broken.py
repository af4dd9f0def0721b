"""A scorer module with a mistake."""

f = undefined_name  # noqa: F821
