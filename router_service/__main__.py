"""`python -m router_service`."""

from router_service.cli import main

if __name__ == "__main__":
    main()
