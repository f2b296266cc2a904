"""Words of messages and tables."""


def plural(n: int, thing: str) -> str:
    """1 patient, 2 patients."""
    return f"{n} {thing}" + ("" if n == 1 else "s")
