"""The load generator behind ``llm-service bench``; it knows nothing else of the application."""
