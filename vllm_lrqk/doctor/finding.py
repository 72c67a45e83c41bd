"""One line of the page."""

from dataclasses import dataclass
from typing import Literal

REBUILD = "install it again beside this torch: pip install --force-reinstall --no-deps ."
"""What to do about compiled kernels that do not suit."""
Status = Literal["fine", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Args:
        status: "fine"; "note": serves, but not as well as it could; "problem": does not serve.
        remedy: what to do, for everything that is not fine.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if (self.status == "fine") != (not self.remedy):
            raise ValueError(f"{self.topic} is {self.status}: what is not fine, and only that, says what to do")
