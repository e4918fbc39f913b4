"""Training: the loop, one optimizer step, and the records they leave."""
