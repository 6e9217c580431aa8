"""Tools: what a request may say of them, how families spell calls, and the grammars that enforce them."""
