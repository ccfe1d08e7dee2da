"""The one exception that means: the user can mend this, and the sentence says how."""


class UserError(ValueError):
    """Bad input. Its message is one sentence that names the thing and the way out; exit code 2."""
