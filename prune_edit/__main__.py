"""`python -m prune_edit` is `prune-edit`."""

from prune_edit.cli import main

if __name__ == "__main__":
    main(prog_name="prune-edit")
