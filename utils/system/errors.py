"""The one exception that scripts turn into a line for the user."""


class UserError(Exception):
    """Something that the user can fix. The message names the file, what is wrong and what to do."""
