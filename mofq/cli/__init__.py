"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

from mofq.exceptions import MofqError

#: What a shell reports for a process that Ctrl-C ended.
_INTERRUPTED = 130


def main() -> None:
    """Run ``mofq``: exit code 0, 1 for a user's error, 2 for wrong usage.

    After ``--json`` an error is one JSON object on stdout too, of its type and message.
    """
    from mofq.cli.commands import command
    from mofq.cli.parsing import UsageError
    from mofq.cli.show.terminal import quiet_noise

    quiet_noise()
    try:
        code = command(prog_name="mofq", standalone_mode=False)
    except UsageError as error:
        error.show()
        _print_error(error.format_message(), kind="UsageError")
        sys.exit(error.exit_code)
    except MofqError as error:
        _complain(str(error), kind=type(error).__name__)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}.", kind=type(error).__name__)
        sys.exit(1)
    except KeyboardInterrupt:
        _interrupted()
    if code == _INTERRUPTED:
        _interrupted()
    sys.exit(code or 0)


def _interrupted() -> None:
    message = "stopped. What was finished is kept; run the same command again to go on."
    _complain(message, kind=KeyboardInterrupt.__name__)
    sys.exit(_INTERRUPTED)


def _complain(message: str, *, kind: str) -> None:
    from mofq.cli.show.terminal import console

    console().print("[bold red]Error:[/] ", end="")
    console().print(message, markup=False, highlight=False, soft_wrap=True)
    _print_error(message, kind=kind)


def _print_error(message: str, *, kind: str) -> None:
    from mofq.cli.show.terminal import print_json

    if "--json" in sys.argv:
        print_json({"error": {"type": kind, "message": message}})
