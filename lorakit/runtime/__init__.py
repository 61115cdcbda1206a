"""The device side: a base model's modules, and the adapters of a batch. Knows no request, no text, no HTTP."""
