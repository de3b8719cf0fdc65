"""What can go wrong that a user can mend. Anything else is a bug of ours and keeps its traceback.

PipelineError            one line: what, its value, the rule, the remedy
├── ConfigError          a parameter is out of bounds, or contradicts the run it continues
├── DataError            a source, an IDX file, a shard or a manifest is missing, torn or not what it claims
├── StorageError         the object store cannot be reached, read or written
├── ClusterError         Ray cannot give the workers or devices asked for
└── TrainingError        training ran and failed

Terminated, which is none of these, says that SIGTERM was heard and obeyed.
"""


class PipelineError(Exception):
    """Root of the tree. `exit_code` is what the command line returns; `may_pass`, whether trying again may help."""

    exit_code = 1
    may_pass = False


class ConfigError(PipelineError):
    """Names the parameter, its value, the rule and the remedy."""

    exit_code = 2

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        # All four go to Exception's args, so that the error survives pickling between processes.
        super().__init__(field, value, rule, remedy)

    def __str__(self) -> str:
        field, value, rule, remedy = self.args
        return f"{field}={value!r}: {rule}; {remedy}"


class DataError(PipelineError):
    """A dataset, at its source or in the store, cannot be used."""


class StorageError(PipelineError):
    """An operation on the object store failed, after as many attempts as are worth making at once."""

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ClusterError(PipelineError):
    """The Ray cluster cannot place the training."""

    may_pass = True


class TrainingError(PipelineError):
    """The training itself failed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended the work; of a training it left a checkpoint to go on from."""


def restored(name: str, args: list[str], may_pass: bool | None = None) -> PipelineError:
    """The error of that class that another process has told of as data, with whether it may pass, if that was said; a
    TrainingError for a class that this version does not have."""
    kind: type[PipelineError] = globals().get(name, TrainingError)
    error = kind(*args)
    if may_pass is not None:
        error.may_pass = may_pass
    return error


def first_line(error: BaseException) -> str:
    """What an error of a library says, as part of a line of ours; its class's name when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
