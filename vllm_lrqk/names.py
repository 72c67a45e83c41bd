"""Names under which vLLM knows the package; those of the methods' backends are the keys of `METHODS`."""

REQUEST_BACKEND = "LRQK_REQUEST_BLOCKS"
"""Backend of the companion layers that own a request's constant blocks."""
WINDOW_BACKEND = "LRQK_WINDOWS"
"""Backend of layers with a sliding window beside those of a method."""
WINDOW_BACKEND_PATH = "vllm_lrqk.integration.window_backend.WindowBackend"
WORKER_EXTENSION = "vllm_lrqk.integration.worker.WorkerExtension"


def backend_path(method: str) -> str:
    """Where the attention backend of a method is."""
    return f"vllm_lrqk.integration.backend.{method}Backend"
