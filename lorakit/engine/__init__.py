"""Continuous batching: requests in, tokens out. Knows requests and token ids; no text and no HTTP."""
