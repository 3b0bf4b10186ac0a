"""``queuectl config``: the settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from shared.cli.failures import WrongArgument
from shared.cli.printing import print_json, print_rows, with_json
from shared.errors import SettingsError
from shared.providers import check_provider
from shared.settings import check_data_dir, check_settings, unknown_names


@click.group()
def config() -> None:
    """The settings."""


@config.command()
@click.option(
    "--config",
    "file",
    type=click.File(encoding="utf-8"),
    help="The configuration that services are started with, such as config.yml.",
)
@with_json
def check(file: Any, is_json: bool) -> None:
    """Print each setting, its value, where it came from, and what is wrong.

    Secrets are hidden. Ends with status 2 where something is wrong. A variable that is named like
    a setting and is none is told, and changes nothing.
    """
    configuration = _configuration(file)
    checked, settings, wrong = check_settings(configuration)
    unknown = unknown_names([each.name for each in checked], configuration)
    if settings is not None:
        for look in (check_data_dir, check_provider):
            try:
                look(settings)
            except SettingsError as exc:
                wrong = [*wrong, str(exc)]
    if is_json:
        shown = [asdict(each) for each in checked]
        print_json({"settings": shown, "wrong": wrong, "unknown": unknown})
    else:
        rows = [(each.name, each.value, each.origin, each.wrong or "") for each in checked]
        print_rows(("setting", "value", "from", "wrong"), rows)
        nothing = "nothing else is wrong" if unknown else "nothing is wrong"
        click.echo("\n" + "\n".join([*unknown, *(wrong or [nothing])]))
    if wrong:
        raise click.exceptions.Exit(2)


def _configuration(file: Any) -> dict[str, Any]:
    if file is None:
        return {}
    # nameko's own, with its ${NAME:default}
    from nameko.cli.main import setup_yaml_parser, yaml

    setup_yaml_parser()
    try:
        found = yaml.safe_load(file)
    except yaml.YAMLError as exc:
        raise WrongArgument(f"--config: is not YAML: {exc}") from exc
    if not isinstance(found, dict):
        raise WrongArgument("--config: must be a mapping of settings")
    return found
