"""How a command ends that could not do what it was told."""

import click


class Failure(click.ClickException):
    """Raised when something failed: status 1."""

    exit_code = 1


class WrongArgument(click.ClickException):
    """Raised when a setting or an argument is wrong: status 2."""

    exit_code = 2
