"""The one exception for a user's mistake. Bugs of ours keep their own exceptions and tracebacks."""


class UserError(ValueError):
    """Something the user gave cannot work. Each problem says what was given, what is allowed and what to do next.

    The command line prints the problems one per line and exits with code 2; from Python it is an ordinary ValueError.
    """

    def __init__(self, *problems: str):
        assert problems, "a UserError needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def first_line(error: Exception) -> str:
    """What an error of a library says, as far as it fits into a sentence of ours; its type when it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def raise_all(problems: list[str]) -> None:
    """Raise one UserError that carries every problem found; do nothing if there is none."""
    if problems:
        raise UserError(*problems)
