"""`tidal serve`: an OpenAI-compatible completions server and its page, over one engine. Needs the extra `serve`."""
