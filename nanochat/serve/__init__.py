"""The web server: requests checked, a waiting line with one thread per model, the OpenAI protocol, the chat page."""
