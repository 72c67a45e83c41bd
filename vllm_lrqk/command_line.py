"""The console script `vllm-lrqk`: `vllm-lrqk eval` and `vllm-lrqk calibrate`."""

import sys

USAGE = """usage: vllm-lrqk eval [MODEL] [options]
       vllm-lrqk calibrate MODEL --output FILE [options]
vllm-lrqk COMMAND --help lists the options."""


def main() -> None:
    """The command that the process's first argument names."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    if command == "eval":
        from vllm_lrqk.evaluation.command import main as evaluate

        return evaluate(arguments)
    if command == "calibrate":
        from vllm_lrqk.calibration.command import main as calibrate

        return calibrate(arguments)
    raise SystemExit(USAGE)
