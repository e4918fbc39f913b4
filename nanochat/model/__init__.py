"""The model: a GPT whose sequence layers and residual scheme are objects from a table."""
