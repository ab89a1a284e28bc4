"""Entry point of `ballast`: sub-command groups, `--config FILE.yaml`, and the mapping of errors to exit codes.

Exit codes: 0 done, 1 the work itself failed, 2 the input was wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from cyclopts import App, CycloptsError
from cyclopts.config import Dict
from rich.console import Console
from rich.markup import escape

from ballast_bench.app import app as bench_app
from ballast_cli import __version__
from ballast_cli.data import data_app
from ballast_cli.graph_ood import graph_ood_app
from ballast_cli.graph_ood_cluster import cluster
from ballast_cli.graph_unlearn import graph_unlearn_app
from ballast_cli.pref import pref_app
from ballast_cli.recsys import recsys_app

if TYPE_CHECKING:
    from collections.abc import Sequence

app = App(
    name="ballast",
    help="Models kept steady under bias, noise, shift, deletion and misaligned rewards.",
    help_epilogue=(
        "Every command also takes `--config FILE.yaml`, a flat file whose keys are the command's flags "
        "(`loss: ssm`); flags on the command line win over the file."
    ),
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says that something is kept
)
app.command(recsys_app)
graph_ood_app.command(cluster)
app.command(graph_ood_app)
app.command(graph_unlearn_app)
app.command(pref_app)
app.command(data_app)
app.command(bench_app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Command-line words without the program name; `sys.argv[1:]` by default.

    Returns:
        0 done, 1 the work failed, 2 bad input, 130 interrupted.
    """
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    # torch-geometric calls torch.jit.script when it is imported; a user of this command can do nothing about it
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
    try:
        tokens, config = split_config(list(sys.argv[1:] if argv is None else argv))
        app.config = () if config is None else (read_config(config, tokens),)
        result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        errors.print(f"[red]error:[/red] {_message(error)}")
        errors.print("Run with --help to see what is accepted.")
        return 2
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, yaml.YAMLError) as error:
        errors.print("[red]error:[/red]", escape(str(error)))
        return 2
    except OSError as error:
        errors.print("[red]error:[/red]", escape(f"{error}; what was finished before is kept"))
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted; what was finished before is kept")
        return 130
    return result if isinstance(result, int) else 0


def split_config(tokens: list[str]) -> tuple[list[str], Path | None]:
    """Take `--config FILE` (or `--config=FILE`) out of the words of a command line.

    Raises:
        ValueError: If `--config` has no file behind it, or is given twice.
    """
    rest: list[str] = []
    files: list[str] = []
    words = iter(tokens)
    for word in words:
        if word == "--config":
            file = next(words, None)
            if file is None or file.startswith("-"):
                raise ValueError("--config needs a YAML file")
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(files) > 1:
        raise ValueError(f"--config was given {len(files)} times; one file is accepted")
    return rest, Path(files[0]) if files else None


def read_config(path: Path, tokens: Sequence[str]) -> Dict:
    """Read a flat YAML file of flags for the command that `tokens` name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not valid YAML (with its line) or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"--config: no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    try:
        values: Any = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of flags to values, got {type(values).__name__}")
    commands, _, _ = app.parse_commands(list(tokens))
    for command in reversed(commands):
        values = {command: values}
    return Dict(values, source=str(path))


def _message(error: CycloptsError) -> str:
    """The error's text on one line (cyclopts wraps its text for a panel)."""
    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
