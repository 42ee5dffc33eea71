"""The curl commands of the user's document, as written there.

The contract tests type them at a service, and the image's test at a container; only the key and
the port are put in.
"""

HEALTH = "curl http://localhost:8000/health"
STATUS = "curl http://localhost:8000/status"
METRICS = "curl http://localhost:8000/metrics"
GENERATE = """curl -X POST http://localhost:8000/v1/generate \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: your-api-key-here" \\
  -d '{
    "prompt": "Explain quantum computing in simple terms",
    "max_tokens": 200,
    "temperature": 0.7
  }'"""
CHAT = """curl -X POST http://localhost:8000/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: your-api-key-here" \\
  -d '{
    "messages": [
      {"role": "user", "content": "What is the capital of France?"}
    ],
    "max_tokens": 100,
    "temperature": 0.7
  }'"""
FIRST = """curl -X POST http://localhost:8000/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: your-api-key-here" \\
  -d '{
    "session_id": "user-123-conversation",
    "messages": [
      {"role": "user", "content": "What is Python?"}
    ],
    "max_tokens": 100
  }'"""
FOLLOW_UP = FIRST.replace("What is Python?", "What are its main features?")
STREAM = """curl -X POST http://localhost:8000/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: your-api-key-here" \\
  -d '{
    "messages": [{"role": "user", "content": "Tell me a story"}],
    "stream": true
  }'"""
