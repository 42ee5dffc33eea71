"""A load generator for OpenAI-compatible servers and this service's native routes."""
