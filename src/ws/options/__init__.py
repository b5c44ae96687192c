"""What commands can be told: one dataclass of plain values each, by the parts of `ws --help`.

Nothing here imports torch, so that `--help`, a mistyped option and a number out of range are answered at once.
"""
