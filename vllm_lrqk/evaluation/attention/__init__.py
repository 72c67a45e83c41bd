"""What attention methods lose of one layer's output, at equal device memory."""


def main(arguments: list[str]) -> None:
    """`vllm-lrqk eval --attention`, see `vllm_lrqk.evaluation.attention.command`."""
    from vllm_lrqk.evaluation.attention.command import main as run

    run(arguments)
