"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

from mofq.exceptions import MofqError

#: What a shell reports for a process that Ctrl-C ended.
_INTERRUPTED = 130


def main() -> None:
    """Run ``mofq``: exit code 0, 1 for a user's error, 2 for wrong usage.

    After ``--json`` an error is one JSON object on stdout too, of its type and message; wrong
    usage, exit code 2, is not.
    """
    from mofq.cli.commands import app
    from mofq.cli.show.terminal import quiet_noise

    quiet_noise()
    try:
        app(prog_name="mofq")
    except MofqError as error:
        _complain(str(error), kind=type(error).__name__)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}.", kind=type(error).__name__)
        sys.exit(1)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> None:
    message = "stopped. What was finished is kept; run the same command again to go on."
    _complain(message, kind=KeyboardInterrupt.__name__)
    sys.exit(_INTERRUPTED)


def _complain(message: str, *, kind: str) -> None:
    from mofq.cli.show.terminal import console, print_json

    console().print("[bold red]Error:[/] ", end="")
    console().print(message, markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv:
        print_json({"error": {"type": kind, "message": message}})
