"""`python -m moec` is the same as `moec`."""

from moec.cli.main import main

if __name__ == "__main__":
    main()
