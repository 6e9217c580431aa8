"""The parser that all commands use. Imports nothing heavy."""

from __future__ import annotations

import argparse

from gqa_serve import __version__
from gqa_serve.settings import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser that says which flag an unknown one was meant to be."""

    def parse(self, words: list[str]) -> argparse.Namespace:
        """The flags in `words`; prints an error and exits with status 2 if one is wrong."""
        args, unknown = self.parse_known_args(words)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            hints = [f"{name}:{hint}" for name in names if (hint := did_you_mean(name, flags, str))]
            self.error(". ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
        return args


def make_parser(prog: str, description: str, **options: str) -> Parser:
    """A parser with `--version`, whose flags can't be abbreviated."""
    parser = Parser(
        prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,  # type: ignore[arg-type]
    )
    parser.add_argument("--version", action="version", version=f"gqa-serve {__version__}")
    return parser
