"""Errors that a user can cause and can mend.

Each message is one line that says what is wrong, where, and what to do next. The command line prints it
and exits with code 2; library users catch :class:`MPIError` or one of its leaves.
"""


class MPIError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 2


class RecipeError(MPIError):
    """A recipe has unknown keys, wrong values or contradictions."""


class DataError(MPIError):
    """A dataset, document or image is missing or broken; the message names file and line."""


class ModelError(MPIError):
    """A model folder, architecture or adapter target cannot be used."""


class CheckpointError(MPIError):
    """A run folder or checkpoint is unusable or belongs to another recipe."""


class ConversionError(MPIError):
    """A checkpoint or adapter cannot be carried to the other format."""


class ServingError(MPIError):
    """The chat session or server was asked for something it must refuse."""


class DeviceError(MPIError):
    """The machine lacks something: memory, disk or a device."""


class TrainingError(MPIError):
    """Training cannot go on: a non-finite loss, or nothing left to train on."""
