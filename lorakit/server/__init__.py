"""HTTP over an engine: OpenAI's routes, with an adapter's name where a model's stands."""
