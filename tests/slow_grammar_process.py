"""The engine process, with grammars that take their time: one that holds the word "slow" compiles for 3 s."""

from __future__ import annotations

import sys
import time
from typing import Any

from gqa_serve.engine import process
from gqa_serve.engine.grammar_compiler import GrammarCompiler

SLOW_S = 3.0

if __name__ == "__main__":
    plain = GrammarCompiler.compile

    def compile_slowly(self: GrammarCompiler, grammar: str) -> Any:
        if "slow" in grammar:
            time.sleep(SLOW_S)
        return plain(self, grammar)

    GrammarCompiler.compile = compile_slowly  # type: ignore[method-assign]
    sys.exit(process.main(int(sys.argv[1])))
