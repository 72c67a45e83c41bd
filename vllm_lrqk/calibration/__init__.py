"""`vllm-lrqk calibrate`."""
