"""`python -m ballast_bench` is `ballast bench`."""

from ballast_bench.app import app

if __name__ == "__main__":
    app()
