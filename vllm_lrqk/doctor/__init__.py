"""`vllm-lrqk doctor`: whether this machine and this installation can serve, on one page."""
