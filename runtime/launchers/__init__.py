"""The Python side of a native kernel launch, one module a kind; each needs torch and ctypes only."""
