"""`vllm-lrqk plan`: what a deployment has room for, from a model's configuration alone."""
