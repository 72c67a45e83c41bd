"""The part that talks to vLLM; nothing below imports it."""
