"""Words of messages and tables."""


def plural(n: int, thing: str, things: str = "") -> str:
    """1 patient, 2 patients; 1 box, 2 boxes, where `things` gives the plural."""
    return f"{n} {thing if n == 1 else things or thing + 's'}"
