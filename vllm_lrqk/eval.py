"""`python -m vllm_lrqk.eval` and `vllm-lrqk eval`."""

import sys


def main() -> None:
    """The evaluation command with the process's arguments."""
    from vllm_lrqk.evaluation.command import main

    main(sys.argv[1:])


def command() -> None:
    """The console script `vllm-lrqk`, of which `eval` is the only command."""
    if sys.argv[1:2] != ["eval"]:
        raise SystemExit("usage: vllm-lrqk eval [MODEL] [options]; vllm-lrqk eval --help lists them")
    del sys.argv[1]
    main()


if __name__ == "__main__":
    main()
