"""nanochat: train a language model from raw text to a chat page, turning one dial."""
