"""The exceptions of prune-edit, one exit code a branch.

    PruneEditError                    1   anything below, as a family
    ├── ModelError                    3   folder missing, corrupt, or not a decoder's
    │   ├── UnsupportedFamilyError    4   an architecture that families.py does not support
    │   └── UnsafeCheckpointError     5   weights only as pickle, files that lead elsewhere
    ├── TaskError                     6   bad line, empty task, answer without tokens
    ├── BudgetError                   7   `abc`, 0 %, 150 %, more units than there are
    ├── OutputExistsError             8   the output is there, or being written
    ├── OutputWriteError              9   disk full, read-only, no permission
    ├── VerificationError            10   what was written does not read back as what was meant
    ├── PlanError                    11   plan or scores of another model, schema or version
    ├── EditError                    12   no better than chance, or cannot be written or undone
    └── GateError                     2   rules that make no sense, figures that were not measured

Click's own usage errors exit with 2, Ctrl-C with 130. `gate` exits with 0 (passed), 1 (blocked) or
2: whatever keeps it from a verdict, the errors above included, is 2 there. Every message names the
value, the place and the remedy, in one line.
"""

from __future__ import annotations


class PruneEditError(Exception):
    """Base of every error a user can cause or mend."""

    exit_code = 1


class ModelError(PruneEditError):
    """The model folder is missing, corrupt, or does not hold a decoder."""

    exit_code = 3


class UnsupportedFamilyError(ModelError):
    """The architecture has no row in the table of families, or one for scoring only."""

    exit_code = 4


class UnsafeCheckpointError(ModelError):
    """The only weights are pickles, which can run code when read, or a file leads elsewhere."""

    exit_code = 5


class TaskError(PruneEditError):
    """The task cannot be read, is empty, or does not fit the model's tokenizer."""

    exit_code = 6


class BudgetError(PruneEditError):
    """A budget that is not a count, a percentage or `all`, or that keeps nothing."""

    exit_code = 7


class OutputExistsError(PruneEditError):
    """The output folder exists and may not be replaced."""

    exit_code = 8


class OutputWriteError(PruneEditError):
    """The output could not be written; what was there before is untouched."""

    exit_code = 9


class VerificationError(PruneEditError):
    """The checkpoint that was written does not read back as what was meant."""

    exit_code = 10


class PlanError(PruneEditError):
    """A plan or scores file that belongs to another model, schema or version."""

    exit_code = 11


class EditError(PruneEditError):
    """An edit that chance would do as well, that the format cannot hold, or cannot be undone."""

    exit_code = 12


class GateError(PruneEditError):
    """The gate has no verdict: rules that contradict or are unknown, or nothing was measured."""

    exit_code = 2
