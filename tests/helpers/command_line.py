"""Commands as a user runs them, in this process."""

from fastprior.cli import command_line as cli


def run(capsys, *argv):
    """Status, stdout, stderr."""
    try:
        status = cli.main([str(arg) for arg in argv])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def error_of(capsys, *argv) -> str:
    """The one line that a user's error prints."""
    status, out, err = run(capsys, *argv)
    assert status == 2 and err.startswith("fastprior: error: ") and err.count("\n") == 1, (status, out, err)
    return err
