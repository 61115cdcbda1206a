"""The multi-tenant demo: a Gradio page on which several tenants answer the same prompt, in one batch."""
