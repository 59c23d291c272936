"""``python -m tilewright`` is the command line."""

from tilewright.frontend.cli import app

if __name__ == "__main__":
    app()
