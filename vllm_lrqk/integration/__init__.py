"""The part that talks to vLLM.

Importing anything from here registers the block managers: a process that unpickles a spec needs its manager.
"""

from vllm_lrqk.integration import manager as _manager  # noqa: F401
