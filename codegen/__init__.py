"""Kernel specs, symbolic expressions and templates: a spec in, the text of one kernel file out.

Imports nothing of ours.
"""
