"""The exceptions with a meaning of their own; any other is a defect of the program or of the machine."""


class UserError(ValueError):
    """Bad input. Its message is one sentence that names the thing and the way out; exit code 2."""


class ContentError(ValueError):
    """A sample is not what it should be. Its message becomes `Sample.fault` and the slot is masked."""
