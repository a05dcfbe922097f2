"""The server over HTTP, as OpenAI's Images and Videos APIs have it and its clients speak it."""
