"""The server over HTTP, as OpenAI's Images API has it and its clients speak it."""
