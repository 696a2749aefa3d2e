"""The main loop and its books: pure asyncio, without Ray, vLLM or torch."""
