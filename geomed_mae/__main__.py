"""`python -m geomed_mae`, the same as the command geomed-mae (and what torchrun starts)."""

from geomed_mae.cli import main

if __name__ == "__main__":
    main()
