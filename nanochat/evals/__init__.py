"""Evaluations: each a function that returns a number or a dict; the recipe decides when."""
