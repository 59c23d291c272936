"""Raise: lift the many spellings of an operation to one canonical op, or say why not."""
