"""A server for the OpenAI protocol, and chat in a terminal."""
