"""`python -m deradiff`: the same as the console command `deradiff`."""

from deradiff.command_line import main

if __name__ == "__main__":
    main()
