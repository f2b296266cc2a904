"""What all packages build on; here the error that users see, and plurals for messages."""


class UserError(Exception):
    """Something that the user can fix. The message names the file, what is wrong and what to do."""


def plural(n: int, thing: str, things: str = "") -> str:
    """1 patient, 2 patients; 1 box, 2 boxes, where `things` gives the plural."""
    return f"{n} {thing if n == 1 else things or thing + 's'}"
