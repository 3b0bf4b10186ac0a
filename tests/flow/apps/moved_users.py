"""The services of ``plain_users``, moved over: only the import is another."""

from tests.flow.plainly import as_if_moved

globals().update(
    {name: x for name, x in vars(as_if_moved("plain_users")).items() if name in ("Greeter",)}
)
