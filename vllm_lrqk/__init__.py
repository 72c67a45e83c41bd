"""LRQK attention for vLLM: low-rank factors on the device, full-precision keys and values in CPU memory."""

__version__ = "0.1.0"
