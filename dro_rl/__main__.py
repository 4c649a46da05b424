"""`python -m dro_rl` is `dro-rl`."""

from dro_rl.cli import app

if __name__ == "__main__":
    app()
