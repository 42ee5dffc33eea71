"""The commands of the service: ``llm-service``, or ``python -m app``.

A command's modules are imported when it runs: the service's own take a second.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from app.utils.errors import StartupError


def _serve(_: argparse.Namespace) -> int:
    """Serve HTTP on app.host and app.port."""
    import uvicorn

    from app.core.config import load_settings
    from app.main import create_app

    settings = load_settings()
    app = create_app(settings)
    # With its default log_config, uvicorn would replace the handlers that were just configured.
    uvicorn.run(app, host=settings.app.host, port=settings.app.port, log_config=None)
    return 0


def _chat(options: argparse.Namespace) -> int:
    """Talk to the model of a running service, or of one that is started for it."""
    from app.cli.chat import chat

    return chat(options.url)


def _check(_: argparse.Namespace) -> int:
    """Check all that a start needs, and say what it would do, without downloading or loading."""
    from app.cli.check import check

    return check()


def _pull(options: argparse.Namespace) -> int:
    """Fetch the configured model, or a named one of the hub, unless it is here."""
    from app.cli.pull import pull

    return pull(options.model, options.revision)


def _new_key(options: argparse.Namespace) -> int:
    """Make an API key and its entry for config.yml, which has only the key's digest."""
    import secrets

    from app.core.config.security import NamedKey, digest_of

    key = secrets.token_hex(32)
    try:
        entry = NamedKey(name=options.name, digest=f"sha256:{digest_of(key).hex()}")
    except ValueError:
        raise StartupError(
            f"{options.name!r} is no name of a key: take at most 64 letters, digits, _ . and -"
        ) from None
    print(f"The key, which nothing keeps:\n\n  {key}\n\nIts entry in config.yml:\n")
    print(f'security:\n  api_keys:\n    - name: {entry.name}\n      digest: "{entry.digest}"')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-service", description="Serves a language model over HTTP, and talks to it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        group: "argparse._SubParsersAction[argparse.ArgumentParser]",
        name: str,
        run: Callable[[argparse.Namespace], int],
        example: str,
    ) -> argparse.ArgumentParser:
        command = group.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    add(commands, "serve", _serve, "APP__PORT=8080 MODEL__SOURCE=bundled llm-service serve")
    example = "SECURITY__API_KEY=… llm-service chat --url http://gpu.example:8000"
    chat = add(commands, "chat", _chat, example)
    chat.add_argument("--url", help="the service's address; default: this machine, app.port")
    add(commands, "check", _check, "MODEL__NAME=google/gemma-2-2b-it llm-service check")
    pull = add(commands, "pull", _pull, "llm-service pull Qwen/Qwen2.5-0.5B-Instruct")
    pull.add_argument("model", nargs="?", help="owner/name, or owner/name/FILE.gguf")
    pull.add_argument("--revision", help="branch, tag or commit; default: the configured one")
    keys = commands.add_parser("keys", help="API keys.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    new = add(keys, "new", _new_key, "llm-service keys new --name reporting")
    new.add_argument("--name", default="new", help="the key's name in the log and in /v1/usage")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (StartupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return status
