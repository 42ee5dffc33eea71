"""POST /v1/responses: OpenAI's protocol of items; docs/api.md has a table of every field."""
