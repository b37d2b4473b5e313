"""The OpenAI-compatible HTTP server of `pipeinfer serve`. Needs the extra `serve` (starlette, uvicorn)."""
