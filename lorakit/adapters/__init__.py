"""The weight side: PEFT checkpoints, their canonical form, and the bank. Knows no GPU, no request, no HTTP."""
