"""A stand-in for the part of the CUDA runtime that registers host memory."""


class Runtime:
    """Keeps what is registered; refuses once more than `limit` bytes would be."""

    def __init__(self, limit: int = 1 << 60) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}
        self.flags: set[int] = set()

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:
        if sum(self.registered.values()) + num_bytes > self.limit:
            return 2
        self.registered[pointer] = num_bytes
        self.flags.add(flags)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0
