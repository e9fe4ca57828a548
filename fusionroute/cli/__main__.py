"""`python -m fusionroute.cli`."""

from fusionroute.cli import main

if __name__ == "__main__":
    main(prog_name="fusionroute")
