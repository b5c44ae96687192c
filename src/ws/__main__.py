"""`python -m ws` is `ws`."""

from ws.cli import main

main()
