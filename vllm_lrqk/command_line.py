"""The console script `vllm-lrqk`."""

import sys
from importlib import import_module

COMMANDS = {
    "plan": ("vllm_lrqk.planning.command", "MODEL --device-memory GIB --host-memory GIB [options]"),
    "doctor": ("vllm_lrqk.doctor.command", "[options]"),
    "eval": ("vllm_lrqk.evaluation.command", "[MODEL] [options]"),
    "calibrate": ("vllm_lrqk.calibration.command", "MODEL --output FILE [options]"),
}
"""Module with the `main` of each, and what follows its name."""
IN_EXTRA = ("rich", "matplotlib", "tqdm")
"""Packages that only these commands need; everything else comes with vLLM."""


def usage() -> str:
    lines = [f"vllm-lrqk {name} {rest}" for name, (_, rest) in COMMANDS.items()]
    return "usage: " + "\n       ".join(lines) + "\nvllm-lrqk COMMAND --help lists the options."


def main() -> None:
    """The command that the process's first argument names."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        raise SystemExit(usage())
    try:
        import_module(COMMANDS[name][0]).main(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "vllm_lrqk":
            raise
        remedy = "pip install 'vllm-lrqk[eval]'" if package in IN_EXTRA else "install vLLM, which brings it"
        raise SystemExit(f"vllm-lrqk {name} needs {package}: {remedy}.") from None
