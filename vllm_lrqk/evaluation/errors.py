"""What ends the command before or while it runs."""


class EvaluationError(ValueError):
    """Something asked for that cannot be evaluated; the message is one sentence with name, value and remedy."""
