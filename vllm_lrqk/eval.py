"""`python -m vllm_lrqk.eval`, which is `vllm-lrqk eval`."""

import sys


def main() -> None:
    """The evaluation command with the process's arguments."""
    from vllm_lrqk.evaluation.command import main

    main(sys.argv[1:])


if __name__ == "__main__":
    main()
