"""`python -m expert_service`."""

from expert_service.cli import main

if __name__ == "__main__":
    main()
